"""Items with what a loss reads beside the policy, and how a batch of them is divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.losses import Objective
from srlm_fast.packing import Cost, Item, PackedBatch, pack, split_batch
from srlm_fast.parallel import World
from srlm_fast.reference import PLACEHOLDER, ReferenceCache, head_item, mismatched_items


class Examples:
    """The items of a data set, checked for what the loss needs.

    Args:
        items: for a paired loss every item has the responses (chosen, rejected), or several such pairs of one prompt,
            one after the other; for a loss that reads labels one label per response.
        objective: the loss; `name` is how messages call it.
        reference: cached log-probabilities of `reference_items`, for a loss that needs them.
        tokens_per_microbatch: most tokens of a packed forward pass.
        cost: by which work is divided evenly among ranks.

    Raises:
        UserError: for no data, items without the responses or labels that the loss needs, a missing reference, or an
            item larger than the micro-batch budget.
    """

    def __init__(
        self,
        items: Sequence[Item],
        objective: Objective,
        name: str,
        *,
        reference: ReferenceCache | None,
        tokens_per_microbatch: int,
        world: World,
        cost: Cost,
    ) -> None:
        self.items, self.objective, self.name = items, objective, name
        self.budget, self.world = tokens_per_microbatch, world
        self._check()
        self.partners = mismatched_items(items) if objective.baseline == "kl" else []
        self._check_sizes()
        self.columns = self._read(reference)
        self.costs = [cost.of(item) for item in items]
        self._partner_costs = [cost.of(item) for item in self.partners]

    def __len__(self) -> int:
        return len(self.items)

    def _where(self, position: int) -> str:
        """An item as messages name it."""
        source = self.items[position].source
        return f"item {position} ({source})" if source else f"item {position}"

    def _check(self) -> None:
        if not self.items:
            raise UserError(f"the data set for loss {self.name!r} is empty")
        for position, item in enumerate(self.items):
            if self.objective.paired and (not item.responses or len(item.responses) % 2):
                raise UserError(
                    f"loss {self.name!r} compares pairs: every item needs a chosen and a rejected response; "
                    f"{self._where(position)} has {len(item.responses)}"
                )
            if self.objective.needs_heads and len(item.responses) != 2:
                raise UserError(
                    f"loss {self.name!r} cuts pairs to their shorter response: it needs one pair in every item; "
                    f"{self._where(position)} has {len(item.responses)} responses"
                )
            if not item.prompt or not all(item.responses):
                raise UserError(
                    f"{self._where(position)} has a prompt of {len(item.prompt)} and responses of "
                    f"{[len(response) for response in item.responses]} tokens; each needs one at least: leave it out"
                )
            labelled = len(item.labels) == len(item.responses) and all(0 <= label <= 1 for label in item.labels)
            if self.objective.needs_labels and not labelled:
                raise UserError(
                    f"loss {self.name!r} needs a label from 0 to 1 for every response; {self._where(position)} has "
                    f"{len(item.responses)} responses and the labels {list(item.labels)}"
                )
        if self.objective.baseline == "kl" and len(self.items) < 2:
            raise UserError(
                f"loss {self.name!r} estimates a KL from responses to other prompts: it needs two items or more"
            )

    def _check_sizes(self) -> None:
        sizes = [max(item.n_tokens, partner.n_tokens) for item, partner in zip(self.items, self.partners or self.items)]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] > self.budget:
            raise UserError(
                f"{self._where(largest)} of {sizes[largest]} tokens does not fit tokens_per_microbatch={self.budget}; "
                f"raise it to at least {sizes[largest]} or shorten the data"
            )

    def _read(self, reference: ReferenceCache | None) -> dict[str, list[Tensor]]:
        """What the loss reads, name of the `LogProbs` field -> [responses] of each item."""
        columns: dict[str, list[Tensor]] = {}
        if self.objective.needs_labels:
            columns["labels"] = [torch.tensor(item.labels, dtype=torch.float32) for item in self.items]
        if not self.objective.needs_reference:
            return columns
        if reference is None:
            raise UserError(f"loss {self.name!r} needs reference log-probabilities; pass a ReferenceCache")
        looked_up = {"reference": self.items}
        if self.objective.needs_heads:
            looked_up["reference_heads"] = [head_item(item) for item in self.items]
        if self.partners:
            looked_up["reference_partners"] = self.partners
        for name, items in looked_up.items():
            columns[name] = list(reference.lookup(items).split([len(item.responses) for item in items]))
        return columns

    def share(self, batch: Sequence[int], *, partners: bool = False) -> list[list[int]]:
        """This rank's micro-batches of a batch; all ranks have the same number, some may be empty."""
        items, costs = (self.partners, self._partner_costs) if partners else (self.items, self.costs)
        plan = split_batch([items[i].n_tokens for i in batch], self.budget, self.world.size, [costs[i] for i in batch])
        return [[batch[i] for i in per_rank[self.world.rank]] for per_rank in plan]

    def pack(self, indices: Sequence[int], *, partners: bool = False) -> PackedBatch:
        """A micro-batch, or the placeholder for an empty one."""
        items = self.partners if partners else self.items
        return pack([items[i] for i in indices] or [PLACEHOLDER], self.world.device)

    def column(self, name: str, indices: Sequence[int]) -> Tensor:
        """A column for a micro-batch, or zeros for the placeholder's two responses."""
        return torch.cat([self.columns[name][i] for i in indices] or [torch.zeros(2)]).to(self.world.device)

    def counts(self, batch: Sequence[int]) -> dict[str, int]:
        """How many of every unit, and of every group that a metric is the mean of, are in a batch."""
        items = [self.items[i] for i in batch]
        n_responses = sum(len(item.responses) for item in items)
        counts = {
            "items": len(items),
            "pairs": n_responses // 2,
            "responses": n_responses,
            "tokens": sum(len(response) for item in items for response in item.responses),
            "chosen_tokens": sum(len(response) for item in items for response in item.responses[0::2]),
            "chosen": n_responses // 2,
            "rejected": n_responses // 2,
        }
        if self.objective.needs_labels and not self.objective.paired:
            counts["chosen"] = sum(label > 0.5 for item in items for label in item.labels)
            counts["rejected"] = n_responses - counts["chosen"]
        return counts
