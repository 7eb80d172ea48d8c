"""The peers' LM heads behind one signature, those that are installed and run on the device.

Every function takes x [N, D], weight [V, D], target [N] and returns log-probabilities [N] or the mean cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]

PACKAGES = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")


def _eager_logprob(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (x @ weight.t()).log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def _eager_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), target)


def logprob_heads(device: torch.device) -> dict[str, Head]:
    """Log-probability of each target, with any upstream gradient."""
    heads: dict[str, Head] = {"torch eager": _eager_logprob, "torch.compile": torch.compile(_eager_logprob)}
    if find_spec("trl"):
        from trl.kernels import ChunkedLogProbFunction

        heads["TRL chunked"] = lambda x, w, t: ChunkedLogProbFunction.apply(x, w, None, t, 1.0, 32768, None, 1.0, ())[0]
    if find_spec("cut_cross_entropy") and device.type == "cuda":
        from cut_cross_entropy import linear_cross_entropy

        heads["CCE"] = lambda x, w, t: -linear_cross_entropy(x, w, t, reduction="none", filter_eps=None)
    if find_spec("liger_kernel") and device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        heads["Liger"] = lambda x, w, t: -liger_fused_linear_cross_entropy(x, w, t, reduction="none")
    return heads


def cross_entropy_heads(device: torch.device) -> dict[str, Head]:
    """Mean cross entropy."""
    heads: dict[str, Head] = {"torch eager": _eager_cross_entropy, "torch.compile": torch.compile(_eager_cross_entropy)}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        heads["F.linear_cross_entropy"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    if find_spec("cut_cross_entropy") and device.type == "cuda":
        from cut_cross_entropy import linear_cross_entropy

        heads["CCE"] = lambda x, w, t: linear_cross_entropy(x, w, t)
    if find_spec("liger_kernel") and device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        heads["Liger"] = lambda x, w, t: liger_fused_linear_cross_entropy(x, w, t)
    if find_spec("quack") and device.type == "cuda":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        heads["QuACK"] = lambda x, w, t: chunked_linear_cross_entropy(x, w, t)
    return heads
