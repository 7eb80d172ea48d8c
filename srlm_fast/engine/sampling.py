"""Temperature and top-p sampling in which every row is alone: no sort, no shared random state.

The randomness of a token is a hash of (request seed, sample index, step): SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
read as a counter-based generator. So neither the neighbours in a batch nor the order of requests can change a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, int64 -> int64 (products wrap)."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def sample_keys(seed: int, n: int) -> Tensor:
    """int64 [n]: the random stream of each sample of a request. Any Python integer is a seed."""
    base = _mix(torch.tensor(_signed(seed + _GOLDEN)))
    return _mix(base + torch.arange(1, n + 1) * _signed(_GOLDEN))


def uniform(keys: Tensor, steps: Tensor, attempt: int) -> Tensor:
    """Float64 [N] in [0, 1) from stream `keys` [N] at `steps` [N] (both int64); `attempt` gives a step more numbers."""
    counter = steps + ((attempt << 32) + 1)
    return _shift(_mix(keys + counter * _signed(_GOLDEN)), 11).double() * 2.0**-53


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """One token per row; the most probable one where temperature is 0 (of equals, the first).

    Top-p keeps a token if those strictly more probable hold less than `top_p` together, so tokens that tie are kept or
    dropped together. It is drawn from by rejection: draw from all tokens by inverse CDF, accept if the token is kept,
    else draw again among the more probable ones. That has the distribution of sorting and cutting in a fraction of the
    time of a sort, and ends because every round leaves fewer tokens.

    Args:
        logits: [N, V].
        temperature, top_p: float [N].
        keys, steps: int64 [N], see `uniform`.

    Returns:
        int64 [N].
    """
    greedy = temperature == 0
    if greedy.all():
        return logits.argmax(-1)
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(-1)
    tokens = torch.empty_like(keys)
    rows, attempt = torch.arange(len(keys), device=keys.device), 0
    while len(rows):
        cdf = probs.cumsum(-1, dtype=torch.float64)
        target = uniform(keys[rows], steps[rows], attempt)[:, None] * cdf[:, -1:]
        # A NaN row points past its end; the clamp leaves it to the caller, who sees the NaN in the log-probability.
        drawn = torch.searchsorted(cdf, target, right=True).clamp_(max=probs.shape[1] - 1)
        tokens[rows] = drawn.squeeze(1)
        likelier = probs * (probs > probs.gather(1, drawn))
        limit = top_p[rows]
        rejected = ((likelier.sum(-1, dtype=torch.float64) >= limit) & (limit < 1)).nonzero().squeeze(1)
        rows, probs, attempt = rows[rejected], likelier[rejected], attempt + 1
    return torch.where(greedy, logits.argmax(-1), tokens) if greedy.any() else tokens
