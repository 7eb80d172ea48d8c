"""One batch through the model: the loss, with its gradients or without, and the metrics under TRL's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from srlm_fast.losses import Objective
from srlm_fast.losses.logprobs import sequence_sums
from srlm_fast.losses.unpaired import kl_estimate, midpoint
from srlm_fast.parallel import Sharding, World
from srlm_fast.reference import sequence_logps
from srlm_fast.trainer.examples import Examples

Sums = dict[str, Tensor]
"""This rank's sums over a batch, by metric."""


class Batches:
    """Runs an objective over batches of examples."""

    def __init__(self, model: nn.Module, sharding: Sharding, objective: Objective, world: World) -> None:
        self.model, self.sharding, self.objective, self.world = model, sharding, objective, world

    def train(
        self,
        examples: Examples,
        batch: Sequence[int],
        counts: Mapping[str, int],
        baseline: float | None,
        before: Callable[[int], None],
    ) -> Sums:
        """Accumulates the gradients of the mean loss of a batch; `before(n)` is called before its micro-batch n."""
        totals: Sums = {}
        share = examples.share(batch)
        for number, indices in enumerate(share):
            before(number)
            loss = self._micro_batch(examples, indices, counts, baseline, totals)
            self.sharding.backward(loss, last=number == len(share) - 1)
        return totals

    @torch.no_grad()
    def evaluate(
        self, examples: Examples, batch: Sequence[int], counts: Mapping[str, int], baseline: float | None
    ) -> Sums:
        """The same without gradients, dropout off."""
        totals: Sums = {}
        was_training = self.model.training
        self.model.eval()
        for indices in examples.share(batch):
            self._micro_batch(examples, indices, counts, baseline, totals)
        self.model.train(was_training)
        self.sharding.reshard()
        return totals

    def _micro_batch(
        self,
        examples: Examples,
        indices: Sequence[int],
        counts: Mapping[str, int],
        baseline: float | None,
        totals: Sums,
    ) -> Tensor:
        """The share of a micro-batch in the loss; it and the metric sums are added to `totals`."""
        packed = examples.pack(indices)
        data = {name: examples.column(name, indices) for name in examples.columns if name != "reference_partners"}
        if baseline is not None:
            data["baseline"] = torch.tensor(baseline, device=self.world.device)
        reference = data.pop("reference", None)
        inputs = packed.input_ids, packed.positions, packed.attend
        collisions = self.objective.needs_collisions
        tokens, entropies, *more = self.sharding.forward(
            *inputs, rows=packed.rows, targets=packed.targets, entropy=True, collisions=collisions
        )
        if collisions:
            data["log_collisions"] = sequence_sums(*more, packed.lengths)
        values, logps = self.objective.evaluate(tokens, packed.lengths, reference, **data)
        weight = float(bool(indices))
        loss = self.objective.total(values, counts) * weight
        sums = {"loss": loss.detach(), "entropy": entropies.detach().sum() * weight}
        if len(values) > 1:
            for term in self.objective.terms:
                sums[f"loss/{term.name}"] = values[term.name].detach().sum() * (weight / counts[term.loss.unit])
        sums.update({name: value * weight for name, value in self.objective.metrics(logps).items()})
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
        return loss

    @torch.no_grad()
    def baseline(self, examples: Examples, batch: Sequence[int]) -> float | None:
        """The log-ratio that those of a batch are compared with: a pass of its own over all ranks, dropout off.

        None for a loss that has none.
        """
        if not self.objective.baseline:
            return None
        kl = self.objective.baseline == "kl"
        totals = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        was_training = self.model.training
        self.model.eval()
        for mine in examples.share(batch, partners=kl):
            reference = examples.column("reference_partners" if kl else "reference", mine)
            ratios = (sequence_logps(self.model, examples.pack(mine, partners=kl)) - reference).double()
            desirable = torch.ones_like(ratios) if kl else (examples.column("labels", mine) > 0.5).double()
            groups = torch.stack((desirable, 1 - desirable)) * bool(mine)
            totals += torch.stack((groups @ ratios, groups.sum(1)), 1).flatten()
        self.model.train(was_training)
        totals = self.world.sum(totals.tolist())
        return kl_estimate(*totals[:2]) if kl else midpoint(*totals)

    def metrics(
        self, totals: Sums, counts: Mapping[str, int], baseline: float | None, flag: bool = False
    ) -> tuple[dict[str, float], bool]:
        """The means over the batch of all ranks, and whether any rank's flag is up."""
        names = sorted(totals)
        sums = self.world.sum([float(flag), *(float(totals[name]) for name in names)])
        metrics = {}
        for name, value in zip(names, sums[1:], strict=True):
            if divisor := _divisor(name, counts):
                metrics[name] = value / divisor
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics.setdefault("rewards/margins", metrics["rewards/chosen"] - metrics["rewards/rejected"])
        if baseline is not None:
            scale = self.objective.beta if self.objective.baseline == "delta" else 1
            metrics[self.objective.baseline] = baseline * scale
        return metrics, sums[0] > 0


def _divisor(name: str, counts: Mapping[str, int]) -> int:
    """What turns the sum of a metric over the batch into its mean; 0 where the batch has nothing of the kind."""
    group, _, which = name.partition("/")
    if group in ("loss", "entropy"):
        return {"loss": 1, "entropy": counts["tokens"]}[group]
    return counts[which if which in ("chosen", "rejected") else "pairs"]
