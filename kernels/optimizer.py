"""AdamW over `adamw_steps_`: torch.optim.AdamW's interface and state, with moments in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from srlm_fast.kernels.adamw import adamw_steps_, check

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AdamW(torch.optim.Optimizer):
    """AdamW whose every step is one pass over each parameter.

    Parameters may be DTensors (FSDP2): each rank updates its shard, and the moments are DTensors alike. The state has
    the keys and shapes of torch.optim.AdamW's (step, exp_avg, exp_avg_sq), so either loads the other's. The steps are
    counted on the CPU. On a GPU there is one launch per parameter.

    Args:
        params: parameters (fp32, or bf16 with stochastically rounded updates), or groups of them as torch's.
        lr, betas, eps, weight_decay: defaults of the groups, which may each have their own.
        moments: "fp32", or "bf16" with stochastic rounding: 4 bytes less per parameter.
        seed: of the stochastic rounding; should differ between ranks. With it, a resumed run equals an undisturbed one.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "fp32",
        seed: int = 0,
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        self.moments, self.seed = moments, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates all parameters that have a gradient; returns what `closure`, called before, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.seed
        for group in self.param_groups:
            self._step_group(group, first)
            first += len(group["params"])
        return loss

    def _step_group(self, group: dict[str, Any], first_seed: int) -> None:
        columns: tuple[list[Tensor], ...] = ([], [], [], [])  # parameters, gradients, first and second moments
        counters, seeds = [], []
        for seed, param in enumerate(group["params"], first_seed):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                zeros = torch.zeros_like(param, dtype=self._moment_dtype(param))
                self._set_state(param, 0, zeros, zeros.clone())
            tensors = param, param.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]
            if hasattr(param, "to_local"):
                tensors = tuple(tensor.to_local() for tensor in tensors)
            for column, tensor in zip(columns, tensors):
                column.append(tensor)
            counters.append(state["step"])
            seeds.append(seed)
        if counters:
            torch._foreach_add_(counters, 1)
            adamw_steps_(
                *columns,
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                steps=[int(counter) for counter in counters],
                seeds=seeds,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but keeps the moments in this optimizer's dtype, where torch makes it that of the parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params):
            if saved := state_dict["state"].get(saved_id):
                dtype = self._moment_dtype(param)
                moments = (saved[name].to(param.device, dtype) for name in ("exp_avg", "exp_avg_sq"))
                self._set_state(param, saved["step"], *moments)

    def _moment_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else MOMENTS[self.moments]

    def _set_state(self, param: Tensor, step: float | Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        check(_local(param), _local(param), _local(exp_avg), _local(exp_avg_sq))
        self.state[param].update(step=torch.tensor(float(step)), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
