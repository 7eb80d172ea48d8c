"""Blocks of a key/value cache: handed out, shared between sequences that begin alike, found again by their tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_TOKENS = 16
"""Positions of a block; csrc/paged_attention.h has the same number."""


class BlockPool:
    """The cache, fp32 [blocks, layers, H_kv, 2, BLOCK_TOKENS * head_dim], and who uses which block of it.

    A block is in use while it has users, afterwards idle if it holds the tokens of a prompt that may come again, else
    free. Idle blocks are given away, the longest unused first, before the cache grows.
    """

    def __init__(self, *sizes: int) -> None:
        self.cache = torch.zeros(0, *sizes)
        self._users: list[int] = []
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    def take(self) -> int:
        """A block for one user; what it holds is of no meaning."""
        if not self._free and self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._name.pop(block)]
            self._free.append(block)
        if not self._free:
            self._grow()
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, block: int) -> int:
        """One more user of a block."""
        if not self._users[block]:
            del self._idle[block]
        self._users[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """One user of each block less."""
        for block in reversed(blocks):  # the end of a prompt is less likely to come again than its beginning
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._name:
                self._idle[block] = None
            else:
                self._free.append(block)

    def copy(self, block: int) -> int:
        """A new block with the content of another."""
        new = self.take()
        self.cache[new] = self.cache[block]
        return new

    def prompt(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """Blocks for a prompt, and how many of its first tokens they hold already, or will when those before it have
        run; never all of them, as the last one's logits are wanted.
        """
        names = _names(ids)
        blocks: list[int] = []
        for name in names[: (len(ids) - 1) // BLOCK_TOKENS]:
            if name not in self._known:
                break
            blocks.append(self.share(self._known[name]))
        held = len(blocks) * BLOCK_TOKENS
        while len(blocks) * BLOCK_TOKENS < len(ids):
            blocks.append(self.take())
            place = len(blocks) - 1
            if place < len(names) and names[place] not in self._known:
                self._known[names[place]] = blocks[-1]
                self._name[blocks[-1]] = names[place]
        return blocks, held

    def forget(self) -> None:
        """No prompt is found any more, as after a change of weights; all blocks are free, so nothing may be in use."""
        self._known.clear()
        self._name.clear()
        self._idle.clear()
        self._users = [0] * len(self._users)
        self._free = list(range(len(self._users)))

    def _grow(self) -> None:
        old = len(self._users)
        n = max(64, old * 3 // 2)
        larger = self.cache.new_empty(n, *self.cache.shape[1:])
        larger[:old] = self.cache
        self.cache = larger
        self._users += [0] * (n - old)
        self._free += range(n - 1, old - 1, -1)


def _names(ids: Sequence[int]) -> list[bytes]:
    """A digest for every whole block of a prompt, of all tokens up to its end."""
    raw, step = array("q", ids).tobytes(), 8 * BLOCK_TOKENS
    digest = hashlib.blake2b(digest_size=16)
    names = []
    for end in range(step, len(raw) + 1, step):
        digest.update(raw[end - step : end])
        names.append(digest.digest())
    return names


def table(blocks: Sequence[int], width: int) -> Tensor:
    """The blocks of a sequence as a row of a table, int64 [width]."""
    return torch.tensor([*blocks, *[0] * (width - len(blocks))])
