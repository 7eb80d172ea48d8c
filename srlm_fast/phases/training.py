"""Training phases: SFT from M0, reference log-probs, DPO from M_t.

The draft of an iteration is what Temporal Self-Rewarding's future model is trained on: other pairs of the same prompts,
from the same M_t.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from srlm_fast import checkpoint, pairs
from srlm_fast.adapters import save_merged
from srlm_fast.config import TrainConfig
from srlm_fast.context import Context
from srlm_fast.data import read_rows
from srlm_fast.errors import UserError
from srlm_fast.lora import add_adapters, init_adapters
from srlm_fast.model import Llama
from srlm_fast.packing import Item
from srlm_fast.parallel import compute_dtype, parallelize
from srlm_fast.phases import PhaseResult, mean
from srlm_fast.phases.data import sft_items
from srlm_fast.progress import progress
from srlm_fast.reference import ReferenceCache, fill, reference_items, response_keys
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


def dpo(run: Context, t: int, draft: bool = False) -> PhaseResult:
    """DPO from M_t on the pairs that it judged; writes models/m(t+1), of a draft models/mTf."""
    items = [item for file in pair_files(run, t, draft) for item in pair_items(file)]
    cache = ReferenceCache.read(run.run_dir / f"m{t}/{_named(draft, 'reference')}.safetensors")
    name = f"m{t}f" if draft else f"m{t + 1}"
    return _train(run, name, run.weights(f"m{t}"), run.config.dpo, items, cache)


def _named(draft: bool, name: str) -> str:
    return f"draft_{name}" if draft else name


def pair_files(run: Context, t: int, draft: bool = False) -> list[Path]:
    """The pairs that M_(t+1), or the future model of iteration t, learns from."""
    earlier = range(1, t) if run.config.pairs.data == "accumulate" else ()
    files = [run.run_dir / f"m{s}/pairs.jsonl" for s in earlier]
    return [*files, run.run_dir / f"m{t}/{_named(draft, 'pairs')}.jsonl"]


def reference(run: Context, t: int, draft: bool = False) -> PhaseResult:
    """Log-probs of the pairs under the reference that the loss needs, dropout off; writes mT/reference.safetensors.

    Raises:
        UserError: with reference.source=file, when the cache lacks some of them.
    """
    run.sleep_engine()
    options, files, name = run.config.reference, pair_files(run, t, draft), f"m{t}/{_named(draft, 'reference')}"
    pairs_read = [item for file in files for item in pair_items(file)]
    items = reference_items(pairs_read, training_objective(run.config.dpo))
    weights = run.weights(f"m{t}" if options.model == "current" else options.model)
    weights_id = run.main(lambda: checkpoint.weights_id(weights))
    parts = run.run_dir / name
    folder = Path(options.cache) if options.cache else parts
    counts = {"responses": sum(len(item.responses) for item in items), "weights_id": weights_id[:16]}
    if options.source == "file":
        cache = ReferenceCache.read_parts(folder, weights_id).restricted(items)
    elif options.source == "rollout":
        cache = rollout_logps(files[-1], weights_id).restricted(items)
        counts.update(_rollout_difference(run, name, weights, items, cache, parts))
    else:
        run.main(lambda: _take_over(run, t, draft, weights_id, folder))
        cache = _forward(run, name, weights, items, weights_id, folder)
    path = run.run_dir / f"{name}.safetensors"
    run.main(lambda: cache.save(path))
    run.main(lambda: shutil.rmtree(parts, ignore_errors=True))
    return [path], counts


def _take_over(run: Context, t: int, draft: bool, weights_id: str, folder: Path) -> None:
    """Put what the run has found for these weights before among the parts, so that it is not computed again."""
    known = [run.run_dir / f"m{s}/reference.safetensors" for s in range(1, t)]
    known += [] if draft else [run.run_dir / f"m{t}/draft_reference.safetensors"]
    for file in known:
        if file.exists() and (cache := ReferenceCache.read(file)).weights_id == weights_id and len(cache):
            cache.add_part(folder)


def _forward(
    run: Context, name: str, weights: Path, items: list[Item], weights_id: str, folder: Path
) -> ReferenceCache:
    """The log-probabilities by a forward pass of the reference, or from the cache folder."""
    with progress(name, len(items) // run.world.size, unit="pairs", enabled=run.world.is_main) as advance:

        def on_done(n: int) -> None:
            run.check_stop(together=True)
            advance(n)

        return fill(
            folder,
            weights_id,
            items,
            lambda: _load(run, weights, dropout=0.0),
            tokens_per_microbatch=run.config.dpo.tokens_per_microbatch,
            world=run.world,
            progress=on_done,
        )


def rollout_logps(path: Path, weights_id: str) -> ReferenceCache:
    """What the engine found while it wrote the answers of a pairs file.

    Raises:
        UserError: when the answers are by other weights.
    """
    cache = ReferenceCache(weights_id)
    for where, row in read_rows(path):
        if row["weights_id"] != weights_id:
            raise UserError(
                f"{where}: an answer by weights {row['weights_id'][:16]}, not {weights_id[:16]}; "
                "use reference.source=forward"
            )
        by_index = {candidate["index"]: candidate for candidate in row["candidates"]}
        sides = [by_index[row[f"{side}_index"]] for side in ("chosen", "rejected")]
        item = Item(tuple(row["prompt_ids"]), tuple(tuple(side["token_ids"]) for side in sides))
        cache.update(zip(response_keys(weights_id, item), (side["logprob"] for side in sides), strict=True))
    return cache


def _rollout_difference(
    run: Context, name: str, weights: Path, items: list[Item], cache: ReferenceCache, folder: Path
) -> dict[str, float]:
    """How far the engine's log-probabilities are from those of a forward pass, on a sample of the pairs."""
    wanted = min(run.config.reference.sample, len(items))
    sample = [items[i * len(items) // wanted] for i in range(wanted)]
    if not sample:
        return {}
    found = _forward(run, name, weights, sample, cache.weights_id, folder)
    difference = cache.lookup(sample) - found.lookup(sample)
    margins = difference.view(-1, 2).diff(dim=1)
    return {
        "compared": len(sample),
        "mean_difference": float(difference.abs().mean()),
        "largest_difference": float(difference.abs().max()),
        "first_loss": float(-nn.functional.logsigmoid(run.config.dpo.beta * margins).mean()),
    }


def pair_items(path: Path) -> list[Item]:
    """The pairs of a file written by mT/pairs, with the token ids that were generated and what labels they have.

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
        labels = (row["label"], 1 - row["label"]) if "label" in row else ()
        items.append(Item(tuple(row["prompt_ids"]), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])), labels))
    return items


def _load(run: Context, weights: Path, dropout: float, seed: int = 0) -> nn.Module:
    """The model of a folder, ready to train; of its weights this process reads and holds its shard only.

    With adapters the frozen weights have the dtype of the computation; `seed` is of the adapters, which change nothing
    before they are trained.
    """
    parallel = run.config.parallel
    with torch.device("meta"):
        model = Llama(run.llama, dropout=dropout)
        add_adapters(model, run.config.lora, base_dtype=compute_dtype(run.world.device, parallel))
    model = parallelize(model, run.world, parallel).to_empty(device=run.world.device)
    checkpoint.load_weights(model, weights)
    init_adapters(model, seed)
    return model


def _train(
    run: Context, name: str, init: Path, config: TrainConfig, items: list[Item], reference: ReferenceCache | None = None
) -> PhaseResult:
    run.sleep_engine()
    phase = f"{name}/train"
    seed = derive_seed(run.config.seed, phase)
    model = _load(run, init, run.config.model.dropout, seed)
    folder = run.run_dir / f"checkpoints/{name}"
    run.main(lambda: folder.mkdir(parents=True, exist_ok=True))
    losses: list[float] = []

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
        seed=seed,
        checkpoint_dir=folder,
        on_step=on_step,
        should_stop=lambda: bool(run.stopping),
        save_by=run.stopping.deadline,
    )
    with progress(phase, trainer.total_steps, unit="steps", enabled=run.world.is_main) as advance:
        trainer.fit()
    outputs, adapter, extra_files = [run.weights(name)], run.run_dir / f"adapters/{name}", run.tokenizer.files
    if run.config.lora.rank:
        outputs.append(adapter)
        save_merged(model, *outputs, base=init, world=run.world, extra_files=extra_files)
    else:
        checkpoint.save_weights(model, run.weights(name), dtype=torch.float32, extra_files=extra_files)
    counts = {"items": len(items), "steps": trainer.total_steps, "last_loss": losses[-1]}
    steps, objective = trainer.total_steps, trainer.objective
    if objective.paired and objective.needs_reference:
        counts["chosen_fall"] = run.main(lambda: _chosen_fall(run, phase, steps, config.beta))
    trainer.close()
    del trainer
    gc.collect()  # the optimizer's memory, before the engine wants some
    if not run.config.lora.rank:  # else the engine reads what was merged
        run.hand_over(model, run.weights(name))
    del model
    gc.collect()
    run.main(lambda: discard(folder))
    return outputs, counts


def _chosen_fall(run: Context, phase: str, steps: int, beta: float) -> float | None:
    """Nats that a chosen response lost against its reference: mean over the last tenth of the steps."""
    logged = {row["step"]: row for row in run.rows("metrics.jsonl") if row.get("phase") == phase and "step" in row}
    tail = [logged[step] for step in range(steps - max(1, steps // 10) + 1, steps + 1) if step in logged]
    return mean([-row["rewards/chosen"] / beta for row in tail if row.get("rewards/chosen") is not None])


def discard(checkpoints: Path) -> None:
    """Delete the checkpoints of a finished training; a kill on the way leaves none that looks whole."""
    trash = checkpoints.with_name(f".{checkpoints.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    checkpoints.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
