"""The loop over optimizer steps.

All randomness (data order, dropout) derives from (seed, step, micro-batch, rank), so a resumed run equals an
undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from srlm_fast.config import TrainConfig
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.packing import Item, epoch_order
from srlm_fast.parallel import World, place_in_copy, sharding_of, whole_tensors
from srlm_fast.reference import ReferenceCache
from srlm_fast.rundir import write_json
from srlm_fast.seeds import derive_seed
from srlm_fast.trainer.batch import Batches
from srlm_fast.trainer.checkpoints import Checkpoints, identity
from srlm_fast.trainer.evaluation import Evaluation
from srlm_fast.trainer.examples import Examples
from srlm_fast.trainer.machine import memory_gb, model_cost, peak_tflops
from srlm_fast.trainer.offload import offloaded
from srlm_fast.trainer.optimization import learning_rate, make_optimizer, set_rate, training_objective

ON_NONFINITE = ("stop", "skip")
MOST_SKIPPED = 10
"""Skipped steps in a row after which training stops: the weights are broken, not a batch."""


class Trainer:
    """Trains a model in place.

    Args:
        model: a `Llama`, as it is or from `parallel.parallelize`, with fp32 parameters.
        items: the data; for a paired loss every item has the responses (chosen, rejected), or several such pairs of one
            prompt, one after the other; for a loss that reads labels one label per response.
        config: loss, optimizer, schedule and batch sizes.
        reference: cached reference log-probabilities of `reference_items`, for a loss that needs them; those of the
            evaluation's items too.
        world: the processes that train together.
        seed: data order and dropout derive from it.
        checkpoint_dir: where training checkpoints are kept; one found there is resumed. None: no checkpoints.
        on_step: called on every rank after every optimizer step with its metrics.
        should_stop: polled after every step; when any rank's says True, a checkpoint is written, where there are any,
            and `fit` raises `Interrupted`.
        save_by: time.time() when such a checkpoint has to be on disk: it is begun in time for a step and a save as long
            as the longest so far, and half as much again.
        evaluation: held-out items and early stopping.
        on_nonfinite: what follows when the loss or the gradient is not finite: "stop", or "skip" the batch. It is
            written to checkpoint_dir/nonfinite-step-N.json first.
        rate: rate(step, total_steps) -> learning rate of a step, from 0; `learning_rate` of the configuration if None.

    Raises:
        UserError: for no data, items without the responses or labels that the loss needs, a missing reference, or an
            item larger than the micro-batch budget; before any work starts.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Item],
        config: TrainConfig,
        *,
        reference: ReferenceCache | None = None,
        world: World | None = None,
        seed: int = 0,
        checkpoint_dir: Path | None = None,
        on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
        save_by: float | None = None,
        evaluation: Evaluation | None = None,
        on_nonfinite: str = "stop",
        rate: Callable[[int, int], float] | None = None,
    ) -> None:
        self.model, self.items, self.config = model, items, config
        self.world = world or World()
        self.seed, self.on_step, self.should_stop, self.save_by = seed, on_step, should_stop, save_by
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        self.evaluation, self.on_nonfinite = evaluation or Evaluation(), on_nonfinite
        self.rate = rate or (lambda step, total: learning_rate(config, step, total))
        if on_nonfinite not in ON_NONFINITE:
            raise UserError(f"on_nonfinite={on_nonfinite!r}: must be one of {', '.join(ON_NONFINITE)}")
        if self.evaluation.stop_when and not self.checkpoint_dir:
            raise UserError("early stopping goes back to the checkpoint of the evaluation before; give checkpoint_dir")
        self.objective = training_objective(config)
        self.examples = self._examples(items, reference)
        self.held_out = self._examples(self.evaluation.items, reference) if self.evaluation.items else None
        self.sharding = sharding_of(model)
        self.batches = Batches(model, self.sharding, self.objective, self.world)
        self.sharding.reshard()
        rounding = derive_seed(seed, "moments", place_in_copy(model, self.world))
        self.optimizer = make_optimizer(model, config, rounding % 2**32)
        self.sharding.begin(self.optimizer)
        self.checkpoints = self._checkpoints(reference) if self.checkpoint_dir else None
        steps_per_epoch = math.ceil(len(items) / config.batch_size)
        self.total_steps = min(steps_per_epoch * config.epochs, config.max_steps or steps_per_epoch * config.epochs)
        self.steps_per_epoch = steps_per_epoch
        self.history: list[dict[str, float]] = []
        self._skipped_in_a_row = 0
        self._longest_step = 0.0
        self._peak = peak_tflops(self.world.device)

    def _examples(self, items: Sequence[Item], reference: ReferenceCache | None) -> Examples:
        return Examples(
            items,
            self.objective,
            self.config.loss,
            reference=reference,
            tokens_per_microbatch=self.config.tokens_per_microbatch,
            world=self.world,
            cost=model_cost(self.model),
        )

    def _checkpoints(self, reference: ReferenceCache | None) -> Checkpoints:
        known = {}
        if self.world.is_main:
            known = identity(self.items, self.config, self.seed, reference.weights_id if reference else None)
        # torch's copies for the background know no tensors of another class, as torchao's moments are
        background = self.config.checkpoint_in_background and self.config.moments != "8bit"
        keep_last = self.config.keep_last
        return Checkpoints(self.checkpoint_dir, self.world, known, keep_last=keep_last, background=background)

    def fit(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one.

        Returns:
            The metrics of the last step and of the last evaluation.

        Raises:
            Interrupted: when asked to stop; a checkpoint was written before, where there are any.
            UserError: when the loss or the gradient stops being finite, or a checkpoint cannot be written; the last
                checkpoint is kept.
        """
        try:
            return self._fit()
        except Interrupted:
            raise
        except Exception:
            if self.checkpoints:
                self.checkpoints.settle()
            raise

    def _fit(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        first_step, self.history = self.checkpoints.resume(self.sharding) if self.checkpoints else (0, [])
        self.model.train()
        cuda = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            for step in range(first_step, self.total_steps):
                started = time.monotonic()
                metrics, stop = self._step(step)
                self.on_step(metrics)
                done = step + 1
                evaluated = self._evaluate(done)
                self._longest_step = max(self._longest_step, time.monotonic() - started)
                if evaluated and self._ended_early():
                    break
                keep_for_stopping = evaluated and self.evaluation.stop_when
                if done == self.total_steps:
                    continue
                if self.checkpoints and (stop or keep_for_stopping or done % self.config.checkpoint_every == 0):
                    self._save(done)
                if stop:
                    if self.checkpoints:
                        self.checkpoints.end()
                    raise Interrupted(f"stopped after step {done} of {self.total_steps}")
        if self.checkpoints:
            self.checkpoints.end()
        self.model.eval()
        return {**metrics, **(self.history[-1] if self.history else {})}

    def close(self) -> None:
        """Let go of the optimizer; the model stays and runs."""
        self.sharding.end()

    def _batch(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.items), self.seed, epoch)
        return order[position * self.config.batch_size : (position + 1) * self.config.batch_size]

    def _step(self, step: int) -> tuple[dict[str, float], bool]:
        started = time.perf_counter()
        batch = self._batch(step)
        counts = self.examples.counts(batch)
        baseline = self.batches.baseline(self.examples, batch)

        def draw_dropout(number: int) -> None:
            torch.manual_seed(derive_seed(self.seed, "dropout", step, number, self.world.rank))

        totals = self.batches.train(self.examples, batch, counts, baseline, draw_dropout)
        lr = self.rate(step, self.total_steps)
        set_rate(self.optimizer, lr)
        grad_norm = self.sharding.clip(self.config.max_grad_norm or math.inf)
        metrics, stop = self.batches.metrics(totals, counts, baseline, self._has_to_stop())
        finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
        if finite:
            self._skipped_in_a_row = 0
            self.sharding.step()
        else:
            self.sharding.discard()
            self._nonfinite(step, batch, metrics["loss"], grad_norm)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped": 1}
        seconds = time.perf_counter() - started
        tokens = sum(self.items[i].n_tokens for i in batch)
        tflops = sum(self.examples.costs[i] for i in batch) / seconds / self.world.size / 1e12
        metrics.update(step=step + 1, lr=lr, items=len(batch), tokens=tokens)
        metrics.update({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {})
        metrics.update(seconds=seconds, tokens_per_second=tokens / seconds, tflops=tflops)
        metrics.update({"mfu": tflops / self._peak} if self._peak else {}, memory_gb=memory_gb(self.world.device))
        return metrics, stop

    def _has_to_stop(self) -> bool:
        """Whether this rank wants a checkpoint now and no more steps, or knows that the last one failed."""
        if self.should_stop() or self.checkpoints and self.checkpoints.failed():
            return True
        needed = 1.5 * (self._longest_step + (self.checkpoints.seconds if self.checkpoints else 0))
        return self.save_by is not None and time.time() + needed >= self.save_by

    def _nonfinite(self, step: int, batch: Sequence[int], loss: float, grad_norm: float) -> None:
        """Keeps the batch of a step that gave no finite loss or gradient; raises UserError unless it is skipped."""
        kept = ""
        if self.checkpoint_dir:
            path = self.checkpoint_dir / f"nonfinite-step-{step + 1}.json"
            kept = f"; the batch is in {path}"
            if self.world.is_main:
                found = {"step": step + 1, "loss": str(loss), "grad_norm": str(grad_norm)}
                write_json(path, found | self._shown(batch))
        self._skipped_in_a_row += 1
        if self.on_nonfinite == "stop" or self._skipped_in_a_row == MOST_SKIPPED:
            why = "Lower the learning rate or look at the data"
            if broken := next((name for name, p in whole_tensors(self.model) if not p.isfinite().all()), None):
                why = f"The model is broken: {broken} has values that are not finite. Train another one"
            raise UserError(
                f"{self.config.loss} step {step + 1}: loss is {loss}, gradient norm {grad_norm}; nothing was updated "
                f"with it{kept}. {why}; the last checkpoint is kept"
            )

    def _shown(self, batch: Sequence[int]) -> dict[str, list[dict]]:
        """The items of a batch, for a person to look at."""
        rows = []
        for i in batch:
            item = self.items[i]
            row = {"item": i, "source": item.source, "prompt": item.prompt, "responses": item.responses}
            rows.append(row | {name: str(column[i].tolist()) for name, column in self.examples.columns.items()})
        return {"items": rows}

    def _evaluate(self, done: int) -> bool:
        """Evaluates when it is due after this many steps; whether it did."""
        due = done % self.evaluation.every == 0 or done == self.total_steps
        if not due or not (self.held_out or self.evaluation.measure):
            return False
        metrics = self._measure(self.held_out) if self.held_out else {}
        if self.evaluation.measure:
            self.model.eval()
            with offloaded(self.optimizer, self.evaluation.offload):
                metrics = {**metrics, **self.evaluation.measure(done)}
            self.model.train()
            self.sharding.reshard()
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.history.append({"step": done, **metrics})
        self.evaluation.report(self.history[-1])
        return True

    def evaluate(self, items: Sequence[Item], reference: ReferenceCache | None = None) -> dict[str, float]:
        """The loss and TRL's metrics of items, as one batch under the model as it is, dropout off.

        Raises:
            UserError: as the constructor.
        """
        return self._measure(self._examples(items, reference))

    def _measure(self, examples: Examples) -> dict[str, float]:
        everything = range(len(examples))
        counts = examples.counts(everything)
        baseline = self.batches.baseline(examples, everything)
        totals = self.batches.evaluate(examples, everything, counts, baseline)
        return self.batches.metrics(totals, counts, baseline)[0]

    def _ended_early(self) -> bool:
        """Whether the rule says to stop; the model then has the weights of the evaluation before."""
        rule = self.evaluation.stop_when
        if rule is None or not rule(self.history):
            return False
        if len(self.history) > 1:
            self.checkpoints.load_model(int(self.history[-2]["step"]), self.sharding)
        return True

    def _save(self, done: int) -> None:
        keep = {int(self.history[-1]["step"])} if self.history and self.evaluation.stop_when else set()
        self.checkpoints.save(done, self.sharding, self.history, keep)
