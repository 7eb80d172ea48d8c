"""Seed data: OASST1 -> IFT examples and ranked prompts; examples -> token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from srlm_fast import checkpoint
from srlm_fast.context import Context
from srlm_fast.data import Example, as_messages, oasst
from srlm_fast.model import Llama
from srlm_fast.packing import Item
from srlm_fast.phases import PhaseResult
from srlm_fast.rundir import write_jsonl
from srlm_fast.seeds import derive_seed

PARTS = ("ift", "eft_train", "eft_eval")


def prepare(run: Context) -> PhaseResult:
    """Read OASST1 and share its prompts between IFT and EFT; with model.random_init write M0."""
    outputs = [run.run_dir / f"data/{part}.jsonl" for part in PARTS]
    counts = run.main(lambda: _write_splits(run))
    if run.config.model.random_init:
        import torch

        model = Llama(run.llama)
        model.init_weights(torch.Generator().manual_seed(derive_seed(run.config.seed, "init")))
        checkpoint.save_weights(model, run.weights("base"), dtype=torch.float32)
        outputs.append(run.weights("base"))
    return outputs, counts


def _write_splits(run: Context) -> dict[str, Any]:
    options = run.config.oasst
    prompts, counts = oasst.read_prompts(options.paths, lang=options.lang)
    split = oasst.split_prompts(
        prompts,
        ift_examples=options.ift_examples,
        eft_share=options.eft_share,
        eft_eval_share=options.eft_eval_share,
        min_replies=options.min_replies,
        seed=run.config.seed,
    )
    for name in PARTS:
        rows = getattr(split, name)
        write_jsonl(run.run_dir / f"data/{name}.jsonl", (asdict(row) for row in rows))
        counts[name] = len(rows)
    return {**counts, "without_best": split.without_best, "beyond_ift": split.beyond_ift}


def sft_items(run: Context, examples: Iterable[Example]) -> list[Item]:
    """Token ids of examples; those above model.max_seq_len are dropped."""
    items = []
    for example in examples:
        prompt = tuple(run.chat.encode_prompt(as_messages(example.prompt)))
        response = tuple(run.chat.encode_response(example.response))
        if len(prompt) + len(response) <= run.config.model.max_seq_len:
            items.append(Item(prompt, (response,)))
    return items
