"""One training run from files to a model folder, as scripts/train.py does it: read, reference, train, save.

RUN/run.json             format version, result-relevant keys, digests of the inputs
RUN/config.yaml          the whole configuration
RUN/data.json            what became of the rows: counts, and where those are that were left out
RUN/reference/           reference log-probs in parts, where the loss needs them and no shared folder is named
RUN/checkpoints/         training state, removed at the end
RUN/metrics.jsonl        a line per optimizer step and per evaluation
RUN/model/               the trained model
RUN/adapter/             with lora.rank, what was trained of it
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from srlm_fast import checkpoint
from srlm_fast.adapters import save_merged
from srlm_fast.config import check_rates
from srlm_fast.config.train import TrainRunConfig
from srlm_fast.dataset import Data, read_items, training_format
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels import library
from srlm_fast.lora import add_adapters, check_options, init_adapters
from srlm_fast.losses import Objective
from srlm_fast.model import Llama
from srlm_fast.opening import existing_inputs, open_run
from srlm_fast.packing import Item
from srlm_fast.parallel import World, check_parallel, compute_dtype, parallelize
from srlm_fast.progress import progress
from srlm_fast.reference import ReferenceCache, fill, reference_items
from srlm_fast.rundir import RunDir, write_json
from srlm_fast.seeds import derive_seed
from srlm_fast.stop import Stop
from srlm_fast.tokenizer import Tokenizer, check_vocab, load_tokenizer
from srlm_fast.trainer import Evaluation, Trainer, check_moments, training_objective, worse_than_before


def train(config: TrainRunConfig, world: World, *, cache_only: bool = False) -> dict[str, Any]:
    """Train a model on files of rows; started again it goes on where it was.

    Args:
        config: see its keys.
        world: the processes that train together.
        cache_only: stop when the reference log-probs are there.

    Returns:
        What was recorded of the run: items, steps, and the metrics of the last step and evaluation.

    Raises:
        UserError: for bad input, before any work starts, or a loss that is not finite.
        Interrupted: on a signal or before save_by, after a checkpoint.
    """
    library.use(config.kernels)
    check_parallel(world.size, config.parallel, [config.training.moments], lora=config.lora.rank)
    objective = training_objective(config.training)
    check_rates("training", config.training)
    check_options(config.lora)
    check_moments(config.training)
    _check_inputs(config, objective)
    run, stopping = RunDir(config.run_dir), Stop(config.save_by)
    world.on_main(lambda: open_run(run, config))
    with stopping.listening(), run.at_work(world.is_main):
        record = world.on_main(lambda: run.phase("train"))
        if record is not None:
            return record["counts"]
        started = time.perf_counter()
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        llama = checkpoint.read_config(config.model)
        check_vocab(tokenizer, llama.vocab_size)
        world.on_main(lambda: checkpoint.check_weights(config.model))
        items, held_out = _read(config, objective, tokenizer, run, world)
        computes_in = compute_dtype(world.device, config.parallel)

        def load_model(dropout: float = 0.0) -> torch.nn.Module:
            with torch.device("meta"):
                model = add_adapters(Llama(llama, dropout), config.lora, base_dtype=computes_in)
            model = parallelize(model, world, config.parallel).to_empty(device=world.device)
            checkpoint.load_weights(model, config.model)
            init_adapters(model, derive_seed(config.seed, "train"))
            return model

        cache = None
        if objective.needs_reference:
            weights_id = world.on_main(lambda: checkpoint.weights_id(config.model))
            folder = Path(config.reference_cache) if config.reference_cache else run / "reference"
            cache = _reference(folder, weights_id, objective, (items, held_out), load_model, config, world, stopping)
        if cache_only:
            return {"items": len(items), "responses": len(cache) if cache else 0}
        trainer = _trainer(config, load_model(config.dropout), items, held_out, cache, run, world, stopping)
        with progress("train", trainer.total_steps, unit="steps", enabled=world.is_main) as advance:
            log = trainer.on_step
            trainer.on_step = lambda metrics: (log(metrics), advance(1, f"loss {metrics.get('loss', 'skipped')}"))
            metrics = trainer.fit()
        outputs = [run / "model"]
        if config.lora.rank:
            outputs.append(run / "adapter")
            save_merged(trainer.model, *outputs, base=config.model, world=world, extra_files=tokenizer.files)
        else:
            checkpoint.save_weights(trainer.model, outputs[0], dtype=torch.float32, extra_files=tokenizer.files)
        counts = {**metrics, "items": len(items), "held_out": len(held_out), "steps": int(metrics.get("step", 0))}
        world.on_main(lambda: run.finish("train", outputs, time.perf_counter() - started, counts))
        world.on_main(lambda: _discard_states(run / "checkpoints"))
        return counts


def _discard_states(checkpoints: Path) -> None:
    """Delete training states; a batch that was kept for inspection stays."""
    for state in checkpoints.glob("step-*"):
        shutil.rmtree(state)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _trainer(
    config: TrainRunConfig,
    model: torch.nn.Module,
    items: Sequence[Item],
    held_out: Sequence[Item],
    cache: ReferenceCache | None,
    run: RunDir,
    world: World,
    stopping: Stop,
) -> Trainer:
    def log(phase: str) -> Callable[[dict[str, float]], None]:
        return lambda metrics: run.log({"phase": phase, **metrics}) if world.is_main else None

    rule = worse_than_before(config.stop_on, lower_is_better=config.stop_on == "eval_loss") if config.stop_on else None
    world.on_main(lambda: (run / "checkpoints").mkdir(parents=True, exist_ok=True))
    return Trainer(
        model,
        items,
        config.training,
        reference=cache,
        world=world,
        seed=derive_seed(config.seed, "train"),
        checkpoint_dir=run / "checkpoints",
        on_step=log("train"),
        should_stop=lambda: bool(stopping),
        save_by=stopping.deadline,
        evaluation=Evaluation(held_out, config.eval_every, report=log("evaluation"), stop_when=rule),
        on_nonfinite=config.on_nonfinite,
    )


def _reference(
    folder: Path,
    weights_id: str,
    objective: Objective,
    parts: Sequence[Sequence[Item]],
    load_model: Callable[[], torch.nn.Module],
    config: TrainRunConfig,
    world: World,
    stopping: Stop,
) -> ReferenceCache:
    """The reference log-probs of all items, from the folder or computed."""
    needed = [item for part in parts if part for item in reference_items(part, objective)]
    with progress("reference", len(needed) // world.size, unit="items", enabled=world.is_main) as advance:

        def on_done(n: int) -> None:
            if world.any(bool(stopping)):  # all ranks alike, for each takes part in every batch
                raise Interrupted("stopped; the same command goes on from here")
            advance(n)

        return fill(
            folder,
            weights_id,
            needed,
            load_model,
            tokens_per_microbatch=config.training.tokens_per_microbatch,
            world=world,
            progress=on_done,
        )


def _read(
    config: TrainRunConfig, objective: Objective, tokenizer: Tokenizer, run: RunDir, world: World
) -> tuple[list[Item], list[Item]]:
    """(items to train on, held-out items); what became of the rows is in data.json."""
    chat = training_format(config.chat_format, tokenizer)

    def read(paths: Sequence[str]) -> Data:
        return read_items(
            list(paths),
            chat,
            objective,
            max_length=config.max_length,
            max_tokens=config.training.tokens_per_microbatch,
            truncation=config.truncation,
            on_bad_row=config.on_bad_row,
            group_prompts=config.group_prompts,
        )

    found = {"data": read(config.data)} | ({"eval_data": read(config.eval_data)} if config.eval_data else {})
    if world.is_main:
        write_json(run / "data.json", {name: {"counts": d.counts, "skipped": d.skipped} for name, d in found.items()})
        for name, data in found.items():
            print(f"{name}: {data.summary()}", file=sys.stderr)
    items = found["data"].items
    if config.eval_data:
        return items, found["eval_data"].items
    n_held_out = _n_held_out(config.eval_share, len(items), least=2 if objective.baseline == "kl" else 1)
    drawn = set(random.Random(f"{config.seed}/held out").sample(range(len(items)), n_held_out))
    return [it for i, it in enumerate(items) if i not in drawn], [it for i, it in enumerate(items) if i in drawn]


def _n_held_out(share: float, n_items: int, least: int) -> int:
    """How many of the items are held out: where any are asked for at least so many as can be evaluated.

    Raises:
        UserError: when fewer than as many are left to train on.
    """
    if not share:
        return 0
    n_held_out = max(least, round(share * n_items))
    if n_items - n_held_out < least:
        raise UserError(
            f"eval_share={share} of {n_items} items leaves {max(0, n_items - n_held_out)} to train on, of which there "
            f"have to be {least}; lower it or bring more rows"
        )
    return n_held_out


def _check_inputs(config: TrainRunConfig, objective: Objective) -> None:
    """Raises UserError where a file or folder is missing, or a rule to stop has nothing to go by."""
    inputs = existing_inputs(config)
    for name, what in (("model", "the folder of a model"), ("data", "at least one file of rows")):
        if name not in inputs:
            raise UserError(f"{name} is empty: name {what}, {name}=PATH")
    if config.stop_on and not (config.eval_data or config.eval_share):
        raise UserError(f"stop_on={config.stop_on} needs held-out rows; name eval_data or set eval_share")
    metrics = sorted(f"eval_{name}" for name in objective.metric_names())
    if config.stop_on and config.stop_on not in metrics:
        raise UserError(f"stop_on={config.stop_on} is no metric of {config.training.loss}: {', '.join(metrics)}")
