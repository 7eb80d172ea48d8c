"""The two kinds of attention of the engine: prompts over their own packed tokens, decoding over a cache of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.model import Attend, LlamaConfig
from srlm_fast.native_ops import decode_attention

BLOCK = 64
"""Cache lengths are multiples of this, so that memory is seldom moved and padding does not change the order of sums."""


class PromptAttention:
    """Causal attention inside each of several packed prompts; keeps their keys and values.

    Each prompt is attended to alone, so its result does not depend on the others. `keys` and `values` are
    [layers, T, H_kv, head_dim] once the model has run.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self._layers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._layers.append((k, v))
        out = torch.empty_like(q)
        start = 0
        for length in self.lengths:
            one = slice(start, start + length)
            qkv = (x[one].transpose(0, 1)[None] for x in (q, k, v))
            attended = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            out[one] = attended[0].transpose(0, 1)
            start += length
        return out

    @property
    def keys(self) -> Tensor:
        return torch.stack([k for k, _ in self._layers])

    @property
    def values(self) -> Tensor:
        return torch.stack([v for _, v in self._layers])


class KVCache:
    """Keys and values of every slot, [layers, slots, H_kv, capacity, head_dim]; grows with `reserve`."""

    def __init__(self, config: LlamaConfig, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def reserve(self, length: int) -> None:
        """Makes room for sequences of `length` tokens; what is stored stays."""
        capacity = self.keys.shape[3]
        if length <= capacity:
            return
        target = -(-max(length, capacity * 3 // 2) // BLOCK) * BLOCK
        # Zeros, not garbage: masked positions enter a product with probability 0, and 0 * NaN is NaN.
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], target, old.shape[4])
            new[:, :, :, :capacity] = old
            setattr(self, name, new)

    def fill(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Copies a prompt, [layers, P, H_kv, head_dim], to the start of a slot."""
        length = keys.shape[1]
        self.keys[:, slot, :, :length] = keys.transpose(1, 2)
        self.values[:, slot, :, :length] = values.transpose(1, 2)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the first `length` positions of slots `source` to slots `target` (int64 [m] each)."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def decode(self, positions: Tensor) -> Attend:
        """Attention of one new token in each of the first n slots, at `positions` (int64 [n])."""
        n = len(positions)
        prefix = (int(positions.max()) // BLOCK + 1) * BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, :n, :, :prefix], self.values[layer, :n, :, :prefix]
            return decode_attention(q, k, v, keys, values, positions)

        return attend
