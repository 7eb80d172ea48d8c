"""The trainer: SFT and preference losses over packed items, on one process or sharded over many.

    trainer = Trainer(model, items, TrainConfig(loss="dpo"), reference=cache)
    trainer.fit()

Nothing here knows of iterations, judges or engines; any list of `Item` can be trained on. All randomness (data order,
dropout) derives from (seed, step, micro-batch, rank), so a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from srlm_fast.config import TrainConfig
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.losses import evaluate, get_loss, preference_metrics
from srlm_fast.packing import Item, epoch_order, pack, split_batch
from srlm_fast.parallel import World
from srlm_fast.reference import PLACEHOLDER, ReferenceCache, token_logps
from srlm_fast.rundir import sync_folder
from srlm_fast.seeds import derive_seed


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to lr, then decay to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, none on norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def _cause(error: BaseException) -> str:
    """One line about the first rank's failure behind a DCP exception."""
    failures = getattr(error, "failures", None) or {0: error}
    first = next(iter(failures.values()))
    first = first[0] if isinstance(first, tuple) else first
    return f"{type(first).__name__} {first}".strip()


class Trainer:
    """Trains a model in place.

    Args:
        model: a `Llama`, sharded by `parallel.shard` or not, with fp32 parameters.
        items: the data; for a paired loss every item has the responses (chosen, rejected).
        config: loss, optimizer, schedule and batch sizes.
        reference: cached reference log-probabilities, for a loss that needs them.
        world: the processes that train together.
        seed: data order and dropout derive from it.
        checkpoint_dir: where training checkpoints are kept; one found there is resumed. None: no checkpoints.
        on_step: called on every rank after every optimizer step with its metrics.
        should_stop: polled after every step; when any rank's says True, a checkpoint is written and `fit` raises
            `Interrupted`.

    Raises:
        UserError: for no data, items of the wrong number of responses, a missing reference, or an item larger than the
            micro-batch budget; before any work starts.
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
    ) -> None:
        self.model, self.items, self.config = model, items, config
        self.world = world or World()
        self.seed, self.checkpoint_dir = seed, checkpoint_dir
        self.on_step, self.should_stop = on_step, should_stop
        self.loss = get_loss(config.loss)
        if not items:
            raise UserError(f"the data set for loss {config.loss!r} is empty")
        if self.loss.paired and any(len(item.responses) != 2 for item in items):
            raise UserError(f"loss {config.loss!r} compares pairs: every item needs a chosen and a rejected response")
        self.reference = None
        if self.loss.needs_reference:
            if reference is None:
                raise UserError(f"loss {config.loss!r} needs reference log-probabilities; pass a ReferenceCache")
            sums = reference.lookup(items)
            self.reference = list(sums.split([len(item.responses) for item in items]))
        split_batch([max(item.n_tokens for item in items)], config.tokens_per_microbatch, self.world.size)
        self.optimizer = make_optimizer(model, config)
        steps_per_epoch = math.ceil(len(items) / config.batch_size)
        self.total_steps = min(steps_per_epoch * config.epochs, config.max_steps or steps_per_epoch * config.epochs)
        self.steps_per_epoch = steps_per_epoch

    def fit(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one. Returns the metrics of the last step.

        Raises:
            Interrupted: when asked to stop; a checkpoint was written before.
            UserError: when the loss or the gradient stops being finite; the last checkpoint is kept.
        """
        metrics: dict[str, float] = {}
        first_step = self._resume()
        self.model.train()
        cuda = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            for step in range(first_step, self.total_steps):
                metrics, stop = self._step(step)
                self.on_step(metrics)
                done = step + 1
                if (
                    done < self.total_steps
                    and self.checkpoint_dir
                    and (stop or done % self.config.checkpoint_every == 0)
                ):
                    self._save(done)
                if stop and done < self.total_steps:
                    raise Interrupted(f"stopped after step {done} of {self.total_steps}")
        self.model.eval()
        return metrics

    def _batch(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.items), self.seed, epoch)
        return order[position * self.config.batch_size : (position + 1) * self.config.batch_size]

    def _count(self, batch: Sequence[int]) -> int:
        if self.loss.unit == "tokens":
            return sum(len(r) for i in batch for r in self.items[i].responses)
        if self.loss.unit == "responses":
            return sum(len(self.items[i].responses) for i in batch)
        return len(batch)

    def _step(self, step: int) -> tuple[dict[str, float], bool]:
        started = time.perf_counter()
        batch = self._batch(step)
        micro_batches = split_batch(
            [self.items[i].n_tokens for i in batch], self.config.tokens_per_microbatch, self.world.size
        )
        count = self._count(batch)
        totals: dict[str, torch.Tensor] = {}
        for number, per_rank in enumerate(micro_batches):
            torch.manual_seed(derive_seed(self.seed, "dropout", step, number, self.world.rank))
            if self.world.size > 1:
                self.model.set_requires_gradient_sync(number == len(micro_batches) - 1)
            self._micro_batch([batch[i] for i in per_rank[self.world.rank]], count, totals)
        lr = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        names = sorted(totals)
        sums = self.world.sum([float(self.should_stop()), *(float(totals[name]) for name in names)])
        metrics = {
            name: value / (1 if name == "loss" else len(batch)) for name, value in zip(names, sums[1:], strict=True)
        }
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            raise UserError(
                f"{self.config.loss} step {step + 1}: loss is {metrics['loss']}, gradient norm {grad_norm}; nothing "
                "was updated with it. Lower the learning rate or look at the data; the last checkpoint is kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        tokens = sum(self.items[i].n_tokens for i in batch)
        metrics.update(step=step + 1, lr=lr, grad_norm=grad_norm, items=len(batch), tokens=tokens)
        metrics.update(seconds=seconds, tokens_per_second=tokens / seconds)
        return metrics, sums[0] > 0

    def _micro_batch(self, indices: Sequence[int], count: int, totals: dict[str, torch.Tensor]) -> None:
        """Forward and backward; adds this rank's share of the loss and of the metric sums to `totals`."""
        chosen = [self.items[i] for i in indices] or [PLACEHOLDER]
        packed = pack(chosen, self.world.device)
        reference = None
        if self.reference is not None:
            kept = [self.reference[i] for i in indices] or [torch.zeros(2)]
            reference = torch.cat(kept).to(self.world.device)
        values, logps = evaluate(
            self.loss,
            token_logps(self.model, packed),
            packed.lengths,
            reference,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
        )
        weight = float(bool(indices))
        loss = values.sum() * (weight / count)
        loss.backward()
        sums = {"loss": loss.detach()}
        if self.loss.paired and reference is not None:
            sums.update({name: value * weight for name, value in preference_metrics(logps, self.config.beta).items()})
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value

    def _state(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def _save(self, step: int) -> None:
        """Write checkpoint_dir/step-N under a temporary name, rename, drop the older ones."""
        temporary = self.checkpoint_dir / ".saving"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.world.barrier()
        try:
            dcp.save(self._state(), checkpoint_id=temporary, no_dist=self.world.size == 1)
        except (OSError, CheckpointException) as error:
            raise UserError(
                f"cannot write a training checkpoint below {self.checkpoint_dir}: {_cause(error)}"
            ) from error
        self.world.barrier()
        if self.world.is_main:
            older = self._checkpoints()
            temporary.rename(self.checkpoint_dir / f"step-{step}")
            sync_folder(self.checkpoint_dir)
            for path in older:
                shutil.rmtree(path)
        self.world.barrier()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.checkpoint_dir.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; returns the number of steps already done."""
        found = self._checkpoints() if self.checkpoint_dir and self.checkpoint_dir.exists() else []
        newest = self.world.broadcast(found[-1] if found else None)
        if newest is None:
            return 0
        state = self._state()
        try:
            dcp.load(state, checkpoint_id=newest, no_dist=self.world.size == 1)
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"cannot resume from {newest}: {_cause(error)}; delete that folder to train from the start"
            ) from error
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(newest.name.partition("-")[2])
