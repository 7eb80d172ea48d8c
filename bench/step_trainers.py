"""One trainer, one process: what bench/step.py starts, alternating, for ours, for TRL's and for single levers.

    python bench/step_trainers.py WHAT FOLDER BATCH      prints one line of JSON

WHAT is "ours/<number>", "trl/<pairs per forward pass>" or "levers/<number>".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from measure import peak_bytes
from step_case import BETA, EOS, LEARNING_RATE, ordered_steps, read_pairs
from torch import Tensor, nn

from srlm_fast.checkpoint import load_model
from srlm_fast.config import TrainConfig
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.kernels import library
from srlm_fast.packing import Item, pack, split_batch
from srlm_fast.parallel import World, parallelize
from srlm_fast.reference import fill, token_logps
from srlm_fast.trainer import Trainer

TOKENS = 4096
OUR_TOKENS = 1280
"""Of our micro-batches, of which the longest pair needs 1,151: fewer tokens need less memory, and less of it is new."""

OURS = (
    "srlm-fast",
    "srlm-fast, parallel.checkpointing=selective",
    "srlm-fast, parallel.checkpointing=selective and moments=bf16",
)

LEVERS = (
    "padded sequences, all rows, torch's operators, reference in every step",
    "+ no padding",
    "+ prefix sharing",
    "+ response-only head",
    "+ fused operators but the head",
    "+ fused head",
    "+ cached reference",
)


def ours(folder: Path, batch_size: int, number: int) -> dict:
    """Our trainer; the reference pass apart."""
    items, losses = read_pairs(folder), []
    checkpointing, moments = "selective" if number >= 1 else "none", "bf16" if number >= 2 else "fp32"
    config = TrainConfig(
        loss="dpo",
        beta=BETA,
        lr=LEARNING_RATE,
        schedule="constant",
        weight_decay=0.0,
        adam_beta2=0.999,
        batch_size=batch_size,
        tokens_per_microbatch=OUR_TOKENS,
        moments=moments,
    )
    started = time.perf_counter()
    cache = fill(
        folder / f"reference-{os.getpid()}",
        "m0",
        items,
        lambda: load_model(folder / "model"),
        tokens_per_microbatch=OUR_TOKENS,
        world=World(),
    )
    reference = time.perf_counter() - started
    model = parallelize(load_model(folder / "model"), World(), ParallelConfig(checkpointing=checkpointing))
    started = time.perf_counter()
    Trainer(model, items, config, reference=cache, on_step=lambda metrics: losses.append(metrics["loss"])).fit()
    return {"reference": reference, "steps": time.perf_counter() - started, "losses": losses}


def trl(folder: Path, batch_size: int, pairs_per_pass: int) -> dict:
    """TRL's DPOTrainer with a precomputed reference, no checkpointing, torch's fused AdamW, the same batches."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        reference_seconds = 0.0

        def _precompute_ref_logps(self, *arguments):
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments)
            self.reference_seconds += time.perf_counter() - started
            return dataset

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    words = {str(i): i for i in range(model.config.vocab_size)}
    words["</s>"], words["<pad>"] = words.pop(str(EOS)), words.pop("0")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")

    def text(ids: tuple[int, ...]) -> str:
        return " ".join(map(str, ids)) + " "

    rows = [
        {"prompt": text(item.prompt), "chosen": text(item.responses[0][:-1]), "rejected": text(item.responses[1][:-1])}
        for batch in ordered_steps(read_pairs(folder), batch_size)
        for item in batch
    ]
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        per_device_train_batch_size=pairs_per_pass,
        gradient_accumulation_steps=batch_size // pairs_per_pass,
        precompute_ref_log_probs=True,
        num_train_epochs=1,
        max_length=None,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Timed(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=processing)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"reference": trainer.reference_seconds, "steps": seconds, "losses": losses}


def levers(folder: Path, batch_size: int, count: int) -> dict:
    """A plain DPO loop with the first `count` levers of `LEVERS`."""
    padded, shared, chosen_rows, fused_head = count < 1, count >= 2, count >= 3, count >= 5
    library.use("fused" if count >= 4 else "reference")
    model, cached = load_model(folder / "model"), {}
    if count < 6:
        reference_model = load_model(folder / "model").requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def sums(network: nn.Module, pairs: list[Item]) -> Tensor:
        items = pairs if shared else [Item(pair.prompt, (response,)) for pair in pairs for response in pair.responses]
        lengths = [len(response) for item in items for response in item.responses]
        if padded:
            longest = max(len(item.prompt) + len(item.responses[0]) for item in items)
            items = [Item(i.prompt, ((*i.responses[0], *[0] * (longest - i.n_tokens)),)) for i in items]
        batch = pack(items)
        if fused_head:
            logps = token_logps(network, batch)
        else:
            rows = batch.rows if chosen_rows else None
            logits = network(batch.input_ids, batch.positions, batch.attend, rows=rows)
            logps = logits.log_softmax(-1) if chosen_rows else logits.log_softmax(-1)[batch.rows]
            logps = logps.gather(1, batch.targets[:, None])[:, 0]
        parts = logps.split(batch.lengths.tolist())
        return torch.stack([part[:length].sum() for part, length in zip(parts, lengths)]).view(-1, 2)

    def micro_batches(batch: list[Item]) -> Iterator[list[Item]]:
        if padded:
            yield from (batch[i : i + 4] for i in range(0, len(batch), 4))
        else:
            sizes = [item.n_tokens if shared else 2 * len(item.prompt) + item.n_tokens for item in batch]
            yield from ([batch[i] for i in ranks[0]] for ranks in split_batch(sizes, TOKENS, 1))

    started, steps, losses = time.perf_counter(), ordered_steps(read_pairs(folder), batch_size), []
    if count >= 6:
        with torch.no_grad():
            for pairs in (part for batch in steps for part in micro_batches(batch)):
                cached.update(zip(pairs, sums(model, pairs)))
    reference_seconds = time.perf_counter() - started
    started = time.perf_counter()
    for batch in steps:
        total = 0.0
        for pairs in micro_batches(batch):
            with torch.no_grad():
                reference = torch.stack([cached[p] for p in pairs]) if cached else sums(reference_model, pairs)
            ratios = sums(model, pairs) - reference
            loss = -nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum() / len(batch)
            loss.backward()
            total += float(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"reference": reference_seconds, "steps": time.perf_counter() - started, "losses": losses}


def main() -> None:
    what, folder, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    name, _, number = what.partition("/")
    if name == "trl":
        import_module("trl")  # not counted as memory that training needs
    result: dict = {}

    def run() -> None:
        result.update({"ours": ours, "trl": trl, "levers": levers}[name](folder, batch_size, int(number)))

    peak = peak_bytes(run, torch.device("cpu"))
    print(json.dumps({**result, "peak": peak}), flush=True)


if __name__ == "__main__":
    main()
