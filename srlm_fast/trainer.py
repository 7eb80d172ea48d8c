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
from srlm_fast.kernels import library
from srlm_fast.kernels.optimizer import AdamW
from srlm_fast.losses import Objective, get_objective
from srlm_fast.losses.unpaired import kl_estimate, midpoint
from srlm_fast.packing import Item, epoch_order, pack, split_batch
from srlm_fast.parallel import World
from srlm_fast.reference import (
    PLACEHOLDER,
    ReferenceCache,
    head_item,
    mismatched_items,
    sequence_logps,
    token_logps,
)
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


def training_objective(config: TrainConfig) -> Objective:
    """The loss of a configuration with its options.

    Raises:
        UserError: for a loss, an option or a value that is not known, or that the trainer has no data for.
    """
    objective = get_objective(
        config.loss, beta=config.beta, label_smoothing=config.label_smoothing, options=config.loss_options
    )
    if any(term.options.get("sampled_alignment") for term in objective.terms):
        raise UserError("loss_options: sampled_alignment needs sum_v p(v)^2, which the output head does not give")
    return objective


def make_optimizer(model: nn.Module, config: TrainConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and none on norms; torch's fused one where kernels are not in use.

    `seed` is of the rounding of bf16 moments; it differs between ranks.

    Raises:
        UserError: for bf16 moments without kernels.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if library.fused():
        return AdamW(groups, **options, moments=config.moments, seed=seed)
    if config.moments != "fp32":
        raise UserError(f"moments={config.moments} needs kernels=fused; torch's AdamW does not have them")
    return torch.optim.AdamW(groups, **options, fused=True)


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
        items: the data; for a paired loss every item has the responses (chosen, rejected), for a loss that reads
            labels one label per response.
        config: loss, optimizer, schedule and batch sizes.
        reference: cached reference log-probabilities of `reference_items`, for a loss that needs them.
        world: the processes that train together.
        seed: data order and dropout derive from it.
        checkpoint_dir: where training checkpoints are kept; one found there is resumed. None: no checkpoints.
        on_step: called on every rank after every optimizer step with its metrics.
        should_stop: polled after every step; when any rank's says True, a checkpoint is written and `fit` raises
            `Interrupted`.

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
    ) -> None:
        self.model, self.items, self.config = model, items, config
        self.world = world or World()
        self.seed, self.checkpoint_dir = seed, checkpoint_dir
        self.on_step, self.should_stop = on_step, should_stop
        self.objective = training_objective(config)
        self._check_items()
        self.partners = mismatched_items(items) if self.objective.baseline == "kl" else []
        split_batch(
            [max(item.n_tokens for item in [*items, *self.partners])], config.tokens_per_microbatch, self.world.size
        )
        self.data = self._read_data(reference)
        self.optimizer = make_optimizer(model, config, derive_seed(seed, "moments", self.world.rank) % 2**32)
        steps_per_epoch = math.ceil(len(items) / config.batch_size)
        self.total_steps = min(steps_per_epoch * config.epochs, config.max_steps or steps_per_epoch * config.epochs)
        self.steps_per_epoch = steps_per_epoch

    def _check_items(self) -> None:
        loss, items = self.config.loss, self.items
        if not items:
            raise UserError(f"the data set for loss {loss!r} is empty")
        if self.objective.paired and any(len(item.responses) != 2 for item in items):
            raise UserError(f"loss {loss!r} compares pairs: every item needs a chosen and a rejected response")
        if self.objective.needs_labels:
            for position, item in enumerate(items):
                if len(item.labels) != len(item.responses) or not all(0 <= label <= 1 for label in item.labels):
                    raise UserError(
                        f"loss {loss!r} needs a label from 0 to 1 for every response; item {position} has "
                        f"{len(item.responses)} responses and the labels {list(item.labels)}"
                    )
        if self.objective.baseline == "kl" and len(items) < 2:
            raise UserError(f"loss {loss!r} estimates a KL from responses to other prompts: it needs two items or more")

    def _read_data(self, reference: ReferenceCache | None) -> dict[str, list[torch.Tensor]]:
        """What the loss reads beside the policy, name of the `LogProbs` field -> [responses] of each item."""
        data: dict[str, list[torch.Tensor]] = {}
        if self.objective.needs_labels:
            data["labels"] = [torch.tensor(item.labels, dtype=torch.float32) for item in self.items]
        if not self.objective.needs_reference:
            return data
        if reference is None:
            raise UserError(f"loss {self.config.loss!r} needs reference log-probabilities; pass a ReferenceCache")
        looked_up = {"reference": self.items}
        if self.objective.needs_heads:
            looked_up["reference_heads"] = [head_item(item) for item in self.items]
        if self.partners:
            looked_up["reference_partners"] = self.partners
        for name, items in looked_up.items():
            data[name] = list(reference.lookup(items).split([len(item.responses) for item in items]))
        return data

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

    def _counts(self, batch: Sequence[int]) -> dict[str, int]:
        """How many of every unit, and of every group that a metric is the mean of, are in a batch."""
        items = [self.items[i] for i in batch]
        counts = {
            "items": len(items),
            "pairs": len(items),
            "responses": sum(len(item.responses) for item in items),
            "tokens": sum(len(response) for item in items for response in item.responses),
            "chosen_tokens": sum(len(item.responses[0]) for item in items),
            "chosen": len(items),
            "rejected": len(items),
        }
        if self.objective.needs_labels and not self.objective.paired:
            counts["chosen"] = sum(label > 0.5 for item in items for label in item.labels)
            counts["rejected"] = counts["responses"] - counts["chosen"]
        return counts

    def _step(self, step: int) -> tuple[dict[str, float], bool]:
        started = time.perf_counter()
        batch = self._batch(step)
        micro_batches = split_batch(
            [self.items[i].n_tokens for i in batch], self.config.tokens_per_microbatch, self.world.size
        )
        counts = self._counts(batch)
        baseline = self._baseline(batch) if self.objective.baseline else None
        totals: dict[str, torch.Tensor] = {}
        for number, per_rank in enumerate(micro_batches):
            torch.manual_seed(derive_seed(self.seed, "dropout", step, number, self.world.rank))
            if self.world.size > 1:
                self.model.set_requires_gradient_sync(number == len(micro_batches) - 1)
            self._micro_batch([batch[i] for i in per_rank[self.world.rank]], counts, baseline, totals)
        lr = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        names = sorted(totals)
        sums = self.world.sum([float(self.should_stop()), *(float(totals[name]) for name in names)])
        metrics = {}
        for name, value in zip(names, sums[1:], strict=True):
            if divisor := self._divisor(name, counts):
                metrics[name] = value / divisor
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics.setdefault("rewards/margins", metrics["rewards/chosen"] - metrics["rewards/rejected"])
        if baseline is not None:
            metrics[self.objective.baseline] = baseline * (
                self.config.beta if self.objective.baseline == "delta" else 1
            )
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

    @staticmethod
    def _divisor(name: str, counts: dict[str, int]) -> int:
        """What turns the sum of a metric over the batch into its mean; 0 where the batch has nothing of the kind."""
        group, _, which = name.partition("/")
        if group == "loss":
            return 1
        return counts[which if which in ("chosen", "rejected") else "items"]

    def _gather(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """A column of `data` for a micro-batch, or for the placeholder of an empty one."""
        return torch.cat([self.data[name][i] for i in indices] or [torch.zeros(2)]).to(self.world.device)

    def _micro_batch(
        self, indices: Sequence[int], counts: dict[str, int], baseline: float | None, totals: dict[str, torch.Tensor]
    ) -> None:
        """Forward and backward; adds this rank's share of the loss and of the metric sums to `totals`."""
        packed = pack([self.items[i] for i in indices] or [PLACEHOLDER], self.world.device)
        data = {name: self._gather(name, indices) for name in self.data if name != "reference_partners"}
        if baseline is not None:
            data["baseline"] = torch.tensor(baseline, device=self.world.device)
        reference = data.pop("reference", None)
        values, logps = self.objective.evaluate(token_logps(self.model, packed), packed.lengths, reference, **data)
        weight = float(bool(indices))
        loss = self.objective.total(values, counts) * weight
        loss.backward()
        sums = {"loss": loss.detach()}
        if len(values) > 1:
            for term in self.objective.terms:
                sums[f"loss/{term.name}"] = values[term.name].detach().sum() * (weight / counts[term.loss.unit])
        sums.update({name: value * weight for name, value in self.objective.metrics(logps).items()})
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value

    @torch.no_grad()
    def _baseline(self, batch: Sequence[int]) -> float:
        """The log-ratio that those of this batch are compared with: one more pass, dropout off, over all ranks."""
        kl = self.objective.baseline == "kl"
        items, column = (self.partners, "reference_partners") if kl else (self.items, "reference")
        plan = split_batch([items[i].n_tokens for i in batch], self.config.tokens_per_microbatch, self.world.size)
        totals = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        self.model.eval()
        for per_rank in plan:
            mine = [batch[i] for i in per_rank[self.world.rank]]
            packed = pack([items[i] for i in mine] or [PLACEHOLDER], self.world.device)
            ratios = (sequence_logps(self.model, packed) - self._gather(column, mine)).double()
            desirable = torch.ones_like(ratios) if kl else (self._gather("labels", mine) > 0.5).double()
            groups = torch.stack((desirable, 1 - desirable)) * bool(mine)
            totals += torch.stack((groups @ ratios, groups.sum(1)), 1).flatten()
        self.model.train()
        totals = self.world.sum(totals.tolist())
        return kl_estimate(*totals[:2]) if kl else midpoint(*totals)

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
