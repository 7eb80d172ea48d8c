"""Reference log-probabilities: computed once, cached on disk under the content they belong to.

    cache = fill(folder, weights_id, items, load_model, tokens_per_microbatch=8192, world=world)

A value is found by (weights id, prompt ids, response ids), so one that belongs to other weights or other tokens cannot
be read by mistake. A cache on disk is a folder of parts, each a file named after its content: ranks, restarts and other
runs add parts to the same folder without meeting, and what is there already is not computed again.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from srlm_fast.errors import UserError
from srlm_fast.losses import Objective, sequence_sums
from srlm_fast.packing import Item, PackedBatch, pack, split_batch
from srlm_fast.parallel import World

_KEY_BYTES = 16
SECONDS_PER_PART = 60.0
"""How much work `fill` loses at most when it is killed."""


def token_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-probability of every response token of a batch, fp32 [N], response after response."""
    return model(batch.input_ids, batch.positions, batch.attend, rows=batch.rows, targets=batch.targets)


def sequence_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Summed log-probability of every response of a batch, fp32 [S]."""
    return sequence_sums(token_logps(model, batch), batch.lengths)


def head_item(item: Item) -> Item:
    """A pair whose responses are cut to the length of the shorter one."""
    length = min(map(len, item.responses))
    return Item(item.prompt, tuple(response[:length] for response in item.responses))


def mismatched_items(items: Sequence[Item]) -> list[Item]:
    """Each item's prompt with the responses of the next item, the last with those of the first (KTO's KL)."""
    return [Item(item.prompt, other.responses) for item, other in zip(items, (*items[1:], items[0]))]


def reference_items(items: Sequence[Item], objective: Objective) -> list[Item]:
    """The items whose log-probabilities the cache must have to train on `items` with this objective."""
    needed = list(items) if objective.needs_reference else []
    if objective.needs_heads:
        needed += [head for item in items if (head := head_item(item)).responses != item.responses]
    if objective.baseline == "kl":
        needed += mismatched_items(items)
    return needed


def response_keys(weights_id: str, item: Item) -> list[bytes]:
    """The cache key of each response of an item."""
    prompt = array("q", item.prompt).tobytes()
    keys = []
    for response in item.responses:
        key = hashlib.blake2b(weights_id.encode(), digest_size=_KEY_BYTES)
        key.update(len(item.prompt).to_bytes(8, "little") + prompt + array("q", response).tobytes())
        keys.append(key.digest())
    return keys


class ReferenceCache:
    """Summed log-probabilities of responses under one set of weights."""

    def __init__(self, weights_id: str, values: dict[bytes, float] | None = None) -> None:
        self.weights_id = weights_id
        self._values = values or {}

    def __len__(self) -> int:
        return len(self._values)

    def missing(self, items: Sequence[Item]) -> list[int]:
        """Positions of the items of which a response is not in the cache."""
        return [
            position
            for position, item in enumerate(items)
            if any(key not in self._values for key in response_keys(self.weights_id, item))
        ]

    def lookup(self, items: Sequence[Item]) -> Tensor:
        """fp32 [S], response after response.

        Raises:
            UserError: listing the positions of the items that are not in the cache.
        """
        if missing := self.missing(items):
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise UserError(
                f"the reference cache of weights {self.weights_id[:12]} lacks {len(missing)} of {len(items)} items "
                f"(positions {shown}); compute it for this data and these weights"
            )
        found = [self._values[key] for item in items for key in response_keys(self.weights_id, item)]
        return torch.tensor(found, dtype=torch.float32)

    def restricted(self, items: Sequence[Item]) -> ReferenceCache:
        """The part of this cache that belongs to `items`; UserError as of `lookup`."""
        keys = (key for item in items for key in response_keys(self.weights_id, item))
        return ReferenceCache(self.weights_id, dict(zip(keys, self.lookup(items).tolist(), strict=True)))

    def update(self, pairs: Iterable[tuple[bytes, float]]) -> None:
        """Add computed values."""
        self._values.update(pairs)

    def save(self, path: Path) -> None:
        """Write as safetensors (keys uint8 [n, 16], logps fp32 [n]), atomically."""
        from srlm_fast.rundir import atomic_file

        with atomic_file(path, "wb") as file:
            file.write(self._bytes())

    def add_part(self, folder: Path) -> None:
        """Write these values as one more part of a cache folder."""
        content = self._bytes()
        from srlm_fast.rundir import atomic_file

        with atomic_file(folder / f"{hashlib.blake2b(content, digest_size=12).hexdigest()}.safetensors", "wb") as file:
            file.write(content)

    def _bytes(self) -> bytes:
        from safetensors.torch import save

        ordered = sorted(self._values)
        keys = torch.tensor(list(b"".join(ordered)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        logps = torch.tensor([self._values[k] for k in ordered], dtype=torch.float32)
        metadata = {"format": "srlm-reference", "version": "1", "weights_id": self.weights_id}
        return save({"keys": keys, "logps": logps}, metadata=metadata)

    @classmethod
    def read(cls, path: Path) -> ReferenceCache:
        """Read what `save` wrote.

        Raises:
            UserError: for a missing, truncated or foreign file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "srlm-reference" or metadata.get("version") != "1":
                    raise UserError(f"{path} is no reference cache of version 1; delete it and compute it again")
                keys, logps = file.get_tensor("keys"), file.get_tensor("logps")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read the reference cache {path}: {error}; delete it and compute it again"
            ) from None
        raw = keys.numpy().tobytes()
        split = [raw[i : i + _KEY_BYTES] for i in range(0, len(raw), _KEY_BYTES)]
        return cls(metadata["weights_id"], dict(zip(split, logps.tolist(), strict=True)))

    @classmethod
    def read_parts(cls, folder: Path, weights_id: str) -> ReferenceCache:
        """All parts of a cache folder that belong to these weights; an empty cache where there are none.

        Raises:
            UserError: for a part that is truncated or foreign.
        """
        cache = cls(weights_id)
        for path in sorted(folder.glob("*.safetensors")):
            part = cls.read(path)
            if part.weights_id == weights_id:
                cache.update(part._values.items())
        return cache


@torch.no_grad()
def compute(
    model: nn.Module,
    items: Sequence[Item],
    weights_id: str,
    micro_batches: Iterable[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda n_items: None,
) -> Iterator[tuple[bytes, float]]:
    """(key, summed log-probability) of the responses of the items in `micro_batches`, dropout off.

    An empty micro-batch still runs the model (other ranks may be in its collectives) and yields nothing.
    """
    was_training = model.training
    model.eval()
    try:
        for indices in micro_batches:
            chosen = [items[i] for i in indices]
            sums = sequence_logps(model, pack(chosen or [PLACEHOLDER], device)).tolist()
            if chosen:
                keys = [key for item in chosen for key in response_keys(weights_id, item)]
                yield from zip(keys, sums, strict=True)
            progress(len(chosen))
    finally:
        model.train(was_training)


def fill(
    folder: Path,
    weights_id: str,
    items: Sequence[Item],
    load_model: Callable[[], nn.Module],
    *,
    tokens_per_microbatch: int,
    world: World,
    progress: Callable[[int], None] = lambda n_items: None,
) -> ReferenceCache:
    """The log-probabilities of all items: those in the cache folder, and the others computed now, dropout off.

    Every rank calls this alike, computes its share and writes it in parts, at least one a minute and one when
    `progress` raises; the same call goes on from there. The model is loaded only where something is missing.

    Args:
        folder: of parts; made where it does not exist.
        weights_id: of the model that `load_model` gives.
        items: as of `reference_items`.
        load_model: gives the model, sharded over the ranks where there are several.
        tokens_per_microbatch: most tokens of one forward pass.
        world: the ranks.
        progress: called with the number of items whenever some are done.

    Raises:
        UserError: for a part that cannot be read or written.
    """
    missing = world.broadcast(ReferenceCache.read_parts(folder, weights_id).missing(items) if world.is_main else None)
    if missing:
        plan = split_batch([items[i].n_tokens for i in missing], tokens_per_microbatch, world.size)
        mine = [[missing[i] for i in per_rank[world.rank]] for per_rank in plan]
        part, started = ReferenceCache(weights_id), time.monotonic()
        try:
            for value in compute(load_model(), items, weights_id, mine, device=world.device, progress=progress):
                part.update([value])
                if time.monotonic() - started > SECONDS_PER_PART:
                    part.add_part(folder)
                    part, started = ReferenceCache(weights_id), time.monotonic()
        finally:  # also where `progress` says to stop
            if len(part):
                part.add_part(folder)
    world.barrier()
    return ReferenceCache.read_parts(folder, weights_id).restricted(items)


PLACEHOLDER = Item(prompt=(0,), responses=((0,), (0,)))
"""What a rank runs, with weight zero, when there are fewer items than ranks."""
