"""AdamW with moments in 8 bits: torchao's, as this project's other optimizers are called."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch.optim import Optimizer

from srlm_fast.errors import UserError

_INSTALL = "pip install 'srlm-fast[8bit]'"


def check_installed() -> None:
    """Raises UserError without torchao."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"moments=8bit needs torchao: {_INSTALL}")


def adamw_8bit(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """torchao's AdamW8bit (Dettmers et al. 2022, arXiv 2110.02861): a code of 8 bits per value, a scale per 256.

    Moments of a shard with less than 4,096 values, or with a number of them that 256 does not divide, stay fp32. On
    CUDA its step is compiled, one kernel per shape; on a CPU it runs as it is. It rounds to the nearest code, so there
    is nothing random.

    Args:
        groups: parameters (fp32), as torch's.
        options: lr, betas, eps, weight_decay.

    Raises:
        UserError: without torchao.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that kernels of its own do not load, which are not used here, is a warning
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"moments=8bit needs torchao ({error}): {_INSTALL}") from None
    finally:
        logger.setLevel(level)

    class AdamW(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

    return AdamW(groups, **options)
