"""Prompts with their responses -> packed variable-length batches.

An item is a prompt with one response (SFT, unpaired data) or several (preference data). It is packed as
[prompt | response 1 | ... | response n]: the prompt runs through the network once, every response's rotary positions
start at len(prompt), and each response attends to the prompt and to itself. The last token of a response is only ever a
target, so it is no input. A response is predicted from the prompt's last row and its own rows but the last.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.kernels.attention import Segments, varlen_attention
from srlm_fast.native_ops import first_fit_decreasing


@dataclass(frozen=True)
class Item:
    """A prompt and its responses as token ids; a response ends with its end-of-turn token."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    labels: tuple[float, ...] = ()
    """One of each response, for a loss that reads them (`losses.LogProbs.labels`)."""
    source: str = field(default="", compare=False)
    """Where it was read, "file:line" or "rows[index]", for messages."""

    @property
    def n_tokens(self) -> int:
        """Tokens that run through the network."""
        return len(self.prompt) + sum(len(r) - 1 for r in self.responses)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one optimizer step over an item, forward and backward."""

    per_token: float = 1.0  # of the linear layers, for a token that runs through the network
    per_attended: float = 0.0  # of attention, for a query and a key that it sees
    per_target: float = 0.0  # of the output head, for a predicted token

    def of(self, item: Item) -> float:
        """The cost of an item; attention within the prompt counts once."""
        prompt, targets = len(item.prompt), 0
        attended = prompt * (prompt + 1) / 2
        for response in item.responses:
            length = len(response) - 1
            attended += length * prompt + length * (length + 1) / 2
            targets += len(response)
        return self.per_token * item.n_tokens + self.per_attended * attended + self.per_target * targets


@dataclass
class PackedBatch:
    """Items packed into one row of T tokens with N predicted tokens in S responses."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], position in prompt + response
    segments: Segments
    rows: Tensor  # int64 [N], token whose hidden state predicts the target
    targets: Tensor  # int64 [N], response after response
    lengths: Tensor  # int64 [S], target tokens of each response

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention function of this layout, as `Llama.forward` wants it."""
        return varlen_attention(q, k, v, self.segments)


def pack(items: Sequence[Item], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay items out one after the other. Index work is done on the CPU; nothing waits for the device.

    Raises:
        UserError: on an item without prompt or response tokens.
    """
    ids: list[int] = []
    positions: list[np.ndarray] = []
    starts: list[int] = []
    lens: list[int] = []
    spans: list[list[tuple[int, int]]] = []
    rows: list[np.ndarray] = []
    targets: list[int] = []
    for item in items:
        if not item.prompt or not item.responses or not all(item.responses):
            raise UserError(
                f"a training item needs a prompt and responses of at least one token each, got {len(item.prompt)} and "
                f"{[len(response) for response in item.responses]} tokens; leave it out"
            )
        prompt_start, prompt_len = len(ids), len(item.prompt)
        ids.extend(item.prompt)
        positions.append(np.arange(prompt_len))
        starts.append(prompt_start)
        lens.append(prompt_len)
        spans.append([(prompt_start, prompt_len)])
        for response in item.responses:
            start, length = len(ids), len(response) - 1
            if length:
                ids.extend(response[:-1])
                positions.append(np.arange(prompt_len, prompt_len + length))
                starts.append(start)
                lens.append(length)
                spans.append([(prompt_start, prompt_len), (start, length)])
            rows.append(np.array([prompt_start + prompt_len - 1]))
            rows.append(np.arange(start, start + length))
            targets.extend(response)
    return PackedBatch(
        input_ids=torch.from_numpy(np.array(ids, dtype=np.int64)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        segments=Segments(starts, lens, spans, device),
        rows=torch.from_numpy(np.concatenate(rows)).to(device),
        targets=torch.from_numpy(np.array(targets, dtype=np.int64)).to(device),
        lengths=torch.tensor([len(r) for item in items for r in item.responses], device=device),
    )


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n) that depends on (seed, epoch) alone."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def split_batch(
    sizes: Sequence[int], budget: int, world_size: int, costs: Sequence[float] | None = None
) -> list[list[list[int]]]:
    """Divide the items of one optimizer step into micro-batches for every rank.

    Args:
        sizes: tokens of each item; they fill the memory.
        budget: tokens of one micro-batch at most.
        world_size: number of ranks; all get the same number of micro-batches, an empty one where items are too few.
        costs: work of each item (`Cost.of`), which takes the time; the sizes if None.

    Returns:
        [micro-batch][rank] -> item indices; the micro-batches that run at the same time cost about the same.

    Raises:
        UserError: when an item is larger than the budget.
    """
    if sizes and max(sizes) > budget:
        raise UserError(
            f"an item of {max(sizes)} tokens does not fit tokens_per_microbatch={budget}; "
            f"raise it to at least {max(sizes)} or shorten the data (max_seq_len)"
        )
    bins = _fill(sizes, budget)
    if world_size > 1:
        costs = sizes if costs is None else costs
        n_bins = -(-len(bins) // world_size) * world_size
        bins = _level(sizes, costs, budget, n_bins) or _halve(bins, costs, n_bins)
        bins.sort(key=lambda b: (-sum(costs[i] for i in b), b))
    else:
        bins.sort(key=lambda b: (-sum(sizes[i] for i in b), b))
    return [bins[i : i + world_size] for i in range(0, len(bins), world_size)]


def _fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """As few micro-batches as first-fit decreasing needs."""
    bin_of = first_fit_decreasing(torch.tensor(sizes, dtype=torch.int64), budget).tolist()
    bins: list[list[int]] = [[] for _ in range(max(bin_of, default=-1) + 1)]
    for item, b in enumerate(bin_of):
        bins[b].append(item)
    return bins


_LEVEL_STEPS = 10_000_000
"""Items x micro-batches above which `_level` would take seconds; so many micro-batches are even without it."""


def _level(sizes: Sequence[int], costs: Sequence[float], budget: int, n_bins: int) -> list[list[int]] | None:
    """The items in n_bins micro-batches of even cost: each, the costliest first, goes where the least is and it fits.

    None where that exceeds the budget.
    """
    if len(sizes) * n_bins > _LEVEL_STEPS:
        return None
    load, tokens = np.zeros(n_bins), np.zeros(n_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    for item in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        fits = tokens + sizes[item] <= budget
        if not fits.any():
            return None
        where = int(np.where(fits, load, np.inf).argmin())
        bins[where].append(item)
        load[where] += costs[item]
        tokens[where] += sizes[item]
    return bins


def _halve(bins: list[list[int]], costs: Sequence[float], n_bins: int) -> list[list[int]]:
    """Divides the costliest micro-batch of several items until there are n_bins; empty ones where items are too few."""
    bins = [list(b) for b in bins]
    while len(bins) < n_bins:
        largest = max(bins, key=lambda b: (len(b) > 1, sum(costs[i] for i in b)))
        by_cost = sorted(largest, key=lambda i: (-costs[i], i))
        largest[:], extra = by_cost[::2], by_cost[1::2]
        bins.append(extra)
    return bins
