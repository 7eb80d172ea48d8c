"""Recomputation of a block's activations in the backward pass, all of them or by operator."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from srlm_fast.model import Attend, Block


def recompute(block: Block, *, selective: bool) -> None:
    """Lets a block keep its input only and run again in the backward pass, with the same dropout.

    selective: it also keeps what the operators give that are expensive and narrow: attention, and the products that
    make the values and follow attention. The two wide products of the MLP, which are most of a block's memory, queries
    and keys, which the rotary embedding overwrites, and everything element-wise are computed again.
    """
    forward = block.forward
    contexts = {"context_fn": partial(_selective_contexts, _kept_products(block))} if selective else {}
    draws = any(getattr(module, "dropout", 0) for module in block.modules())

    def forward_again(x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        if delta is not None:
            x = x + delta  # as the block's first norm does; here, so that one tensor is kept and not two
        arguments = (x, None, cos, sin, attend)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=draws, **contexts)

    block.forward = forward_again


_PRODUCTS = {"srlm::linear", "aten::mm"}


def _kept_products(block: Block) -> set[int]:
    """Which of the products of a pass through a block are kept: those with the weights of v and o."""
    attention, mlp = block.self_attn, block.mlp
    before, kept = 0, set()
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj):
        kept |= {before} if layer in (attention.v_proj, attention.o_proj) else set()
        before += layer.n_products
    return kept


def _selective_contexts(kept: set[int]) -> tuple[Any, Any]:
    """What `checkpoint` wants for one pass through a block: it counts the block's products."""
    seen = {False: 0, True: 0}  # in the forward pass, when running again

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().partition(".")[0]
        if name in _PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] - 1 in kept
        else:
            keep = ("attention" in name or "attn" in name) and "backward" not in name
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
