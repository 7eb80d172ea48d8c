"""What the tests of the output head's operators share: cases, exact losses, and a record of what torch computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlm_fast.kernels import library
from srlm_fast.kernels.linear_softmax import CHUNK_BYTES
from srlm_fast.kernels.softmax_rows import ALIGNMENT, Softmax

BUDGETS = ("kept", "chunks")
"""Ways to U: all of it kept, or chunks of a half of the rows at most, a sixth in narrow dtypes."""


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    target: Tensor
    grad: Tensor

    def chunk_bytes(self, budget: str) -> int:
        """The argument of the operators that has them keep U, or not even that of the rows that `ignoring` leaves."""
        if budget == "kept":
            return CHUNK_BYTES
        width = -(-len(self.weight) // ALIGNMENT) * ALIGNMENT
        return max(1, len(self.target) * width * self.x.itemsize // 2)

    def exact(self) -> Case:
        """The same numbers in float64."""
        x, weight = (t.detach().double().requires_grad_() for t in self[:2])
        return Case(x, weight, self.target, self.grad.double())


def make(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Case:
    """Random x, weight, targets (the first 0, the last V - 1), and an upstream gradient that differs by row."""
    generator = torch.Generator().manual_seed(n * 10_000 + v * 10 + d)
    x = (torch.randn(n, d, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    if n:
        target[0], target[-1] = 0, v - 1
    return Case(x, weight, target, torch.randn(n, generator=generator, dtype=torch.promote_types(dtype, torch.float32)))


def exact_losses(raw: Tensor, target: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Losses and entropies [N] of float64 logits [N, V], for autograd."""
    z = raw if not softmax.softcap else softmax.softcap * torch.tanh(raw / softmax.softcap)
    log_p = torch.log_softmax(z / softmax.temperature, dim=1)
    lse = torch.logsumexp(z / softmax.temperature, dim=1)
    uniform = torch.full_like(log_p, softmax.label_smoothing / raw.shape[1])
    wanted = uniform.scatter_add(1, target[:, None], torch.full_like(lse[:, None], 1 - softmax.label_smoothing))
    return -(wanted * log_p).sum(1) + softmax.z_loss * lse**2, -(log_p.exp() * log_p).sum(1)


class Recorder(TorchDispatchMode):
    """Runs operators in plain torch and looks into them: FLOPs of the products, and bytes of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "srlm":
            with self:
                return library.OPERATORS[func._schema.name.removeprefix("srlm::")].torch(*args)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result
