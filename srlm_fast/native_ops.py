"""The C++ operators of csrc/, found at run time; exact plain-Python versions where they were not built."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from srlm_fast.errors import UserError

OPERATORS = ("decode_attention", "first_fit_decreasing", "decoder_generate")
"""What the shared object must hold, as torch.ops.srlm.<name>."""


def library_name() -> str:
    """The shared object for this machine: torch's own choice of instruction set, so that both can be capped alike."""
    capability = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    return f"libsrlm_{capability}{'.dylib' if sys.platform == 'darwin' else '.so'}"


@functools.cache
def native_available() -> bool:
    """Whether the shared object is there and loads; warns once per process when it does not."""
    path = Path(__file__).parent / library_name()
    if path.is_file():
        try:
            torch.ops.load_library(str(path))
            if all(hasattr(torch.ops.srlm, name) for name in OPERATORS):
                return True
            reason = f"{path.name} is of older sources"
        except OSError as error:
            reason = f"{path.name} does not load into torch {torch.__version__}: {error}"
    else:
        reason = "they were not built"
    warnings.warn(
        f"srlm-fast: native operators not in use ({reason}); using the slower plain-Python ones. "
        "To build them: python setup.py build_ext --inplace",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def first_fit_decreasing(lengths: Tensor, budget: int) -> Tensor:
    """Packs items into bins of `budget`: longest first (ties by index), each into the first bin with room for it.

    Args:
        lengths: int64 [n] on the CPU, each between 0 and `budget`.
        budget: the capacity of a bin, in the unit of `lengths` (tokens).

    Returns:
        int64 [n], the bin of every item; bins are numbered from 0 without a gap. O(n log n), deterministic.

    Raises:
        UserError: naming the first item that is negative or does not fit into a bin.
    """
    unfit = ((lengths < 0) | (lengths > budget)).nonzero()
    if len(unfit):
        item = int(unfit[0])
        raise UserError(f"packing: item {item} has {int(lengths[item])} tokens, outside 0..{budget}; raise the budget")
    if native_available():
        return torch.ops.srlm.first_fit_decreasing(lengths, budget)
    return torch.tensor(_first_fit_decreasing(lengths.tolist(), budget), dtype=torch.int64)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Attention of one new token per row over a cache, which the token's key and value join first.

    A row reads its own positions 0..positions[row] only, in an order that does not depend on the other rows.

    Args:
        q: [n, H, head_dim]; k, v: [n, H_kv, head_dim] with H a multiple of H_kv.
        k_cache, v_cache: [n, H_kv, L, head_dim] (strided views will do), written at `positions`.
        positions: int64 [n], below L.

    Returns:
        softmax(q K^T / sqrt(head_dim)) V, [n, H, head_dim]. The C++ version is for fp32 on the CPU; elsewhere torch
        computes it over the whole of L, masked.
    """
    if q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[2] % 16 == 0 and native_available():
        return torch.ops.srlm.decode_attention(q, k, v, k_cache, v_cache, positions)
    return _decode_attention(q, k, v, k_cache, v_cache, positions)


def _decode_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    n, n_kv_heads, length, head_dim = k_cache.shape
    rows = torch.arange(n, device=q.device)
    k_cache[rows, :, positions], v_cache[rows, :, positions] = k, v
    # The queries that share a key head are rows of one product, so keys need not be repeated.
    scores = q.view(n, n_kv_heads, -1, head_dim) @ k_cache.transpose(2, 3) * head_dim**-0.5
    unseen = torch.arange(length, device=q.device) > positions[:, None]
    scores = scores.masked_fill_(unseen[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ v_cache).reshape(q.shape)


def _first_fit_decreasing(lengths: list[int], budget: int) -> list[int]:
    """The algorithm of csrc/first_fit_decreasing.cpp: a tree of the most room left below each node."""
    n_leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [budget] * (2 * n_leaves)
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < n_leaves:
            node *= 2
            node += room[node] < lengths[item]
        bins[item] = node - n_leaves
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
