"""Training phases: SFT from M0, reference log-probs, DPO from M_t."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from srlm_fast import checkpoint, pairs
from srlm_fast.config import TrainConfig
from srlm_fast.context import Context
from srlm_fast.data import read_rows
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.packing import Item, split_batch
from srlm_fast.parallel import shard
from srlm_fast.phases import PhaseResult
from srlm_fast.phases.data import sft_items
from srlm_fast.progress import progress
from srlm_fast.reference import ReferenceCache, compute, reference_items
from srlm_fast.seeds import derive_seed
from srlm_fast.trainer import Trainer, training_objective


def sft(run: Context, name: str, sources: Sequence[str]) -> PhaseResult:
    """SFT of M0 on the examples of the run's jsonl files; writes models/NAME."""
    examples = [example for source in sources for example in run.examples(source)]
    items = sft_items(run, examples)
    if not items:
        raise UserError(
            f"{name}/train: none of {len(examples)} examples fits model.max_seq_len={run.config.model.max_seq_len}; "
            "raise it"
        )
    outputs, counts = _train(run, name, run.weights("base"), run.config.sft, items)
    return outputs, {**counts, "too_long": len(examples) - len(items)}


def dpo(run: Context, t: int) -> PhaseResult:
    """DPO from M_t on the pairs that it made and judged; writes models/m(t+1)."""
    items = pair_items(run.run_dir / f"m{t}/pairs.jsonl")
    cache = ReferenceCache.read(run.run_dir / f"m{t}/reference.safetensors")
    return _train(run, f"m{t + 1}", run.weights(f"m{t}"), run.config.dpo, items, cache)


def reference(run: Context, t: int) -> PhaseResult:
    """Log-probs of M_t's pairs under M_t that the loss needs, dropout off; writes mT/reference.safetensors."""
    run.sleep_engine()
    items = reference_items(pair_items(run.run_dir / f"m{t}/pairs.jsonl"), training_objective(run.config.dpo))
    weights_id = run.main(lambda: checkpoint.weights_id(run.weights(f"m{t}")))
    values = _reference_values(run, t, items, weights_id) if items else []
    cache = ReferenceCache(weights_id)
    for part in run.world.gather(values):
        cache.update(part)
    path = run.run_dir / f"m{t}/reference.safetensors"
    run.main(lambda: cache.save(path))
    return [path], {"responses": len(cache), "weights_id": weights_id[:16]}


def _reference_values(run: Context, t: int, items: list[Item], weights_id: str) -> list[tuple[bytes, float]]:
    """This rank's share of the log-probabilities, with the keys they are cached under."""
    model = _load(run, run.weights(f"m{t}"), dropout=0.0)
    plan = split_batch([item.n_tokens for item in items], run.config.dpo.tokens_per_microbatch, run.world.size)
    mine = [per_rank[run.world.rank] for per_rank in plan]
    with progress(f"m{t}/reference", sum(map(len, mine)), unit="pairs", enabled=run.world.is_main) as advance:

        def on_done(n: int) -> None:
            run.check_stop()
            advance(n)

        return compute(model, items, weights_id, mine, device=run.world.device, progress=on_done)


def pair_items(path: Path) -> list[Item]:
    """The pairs of a file written by mT/pairs, with the token ids that were generated.

    Raises:
        UserError: for rows of another format version.
    """
    items = []
    for where, row in read_rows(path):
        if row.get("format") != pairs.FORMAT:
            raise UserError(
                f"{where}: a pair of format {row.get('format')}, this program reads {pairs.FORMAT}; delete the file to "
                "have its pairs made again"
            )
        items.append(Item(tuple(row["prompt_ids"]), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))))
    return items


def _load(run: Context, weights: Path, dropout: float) -> nn.Module:
    model = shard(Llama(run.llama, dropout=dropout).to(run.world.device), run.world)
    checkpoint.load_weights(model, weights)
    return model


def _train(
    run: Context, name: str, init: Path, config: TrainConfig, items: list[Item], reference: ReferenceCache | None = None
) -> PhaseResult:
    run.sleep_engine()
    model = _load(run, init, run.config.model.dropout)
    folder = run.run_dir / f"checkpoints/{name}"
    run.main(lambda: folder.mkdir(parents=True, exist_ok=True))
    losses: list[float] = []
    phase = f"{name}/train"

    def on_step(metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        if run.world.is_main:
            run.run_dir.log({"phase": phase, **metrics})
        advance(1, f"loss {metrics['loss']:.4f}")

    trainer = Trainer(
        model,
        items,
        config,
        reference=reference,
        world=run.world,
        seed=derive_seed(run.config.seed, phase),
        checkpoint_dir=folder,
        on_step=on_step,
        should_stop=lambda: run.stopping,
    )
    with progress(phase, trainer.total_steps, unit="steps", enabled=run.world.is_main) as advance:
        trainer.fit()
    checkpoint.save_weights(model, run.weights(name), dtype=torch.float32, extra_files=run.tokenizer.files)
    counts = {"items": len(items), "steps": trainer.total_steps, "last_loss": losses[-1]}
    del model, trainer
    gc.collect()
    run.main(lambda: discard(folder))
    return [run.weights(name)], counts


def discard(checkpoints: Path) -> None:
    """Delete the checkpoints of a finished training; a kill on the way leaves none that looks whole."""
    trash = checkpoints.with_name(f".{checkpoints.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    checkpoints.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
