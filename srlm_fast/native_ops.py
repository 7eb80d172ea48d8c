"""The C++ operators of csrc/, found at run time; exact plain-Python versions where they were not built."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from srlm_fast.errors import UserError


@functools.cache
def native_available() -> bool:
    """Whether the shared object is there and loads; warns once per process when it does not."""
    folder = Path(__file__).parent
    found = [path for path in (folder / "libsrlm.so", folder / "libsrlm.dylib") if path.is_file()]
    if found:
        try:
            torch.ops.load_library(str(found[0]))
            return True
        except OSError as error:
            reason = f"{found[0].name} does not load into torch {torch.__version__}: {error}"
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
