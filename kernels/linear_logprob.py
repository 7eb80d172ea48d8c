"""Log-probabilities of target tokens straight from hidden states: -loss of kernels/linear_softmax.py.

logp[n] = z[n, target[n]] - logsumexp_v z[n, v]        z = softcap tanh(x W^T / softcap) / temperature
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.head_losses import check, check_range, reference_losses, row_losses
from srlm_fast.kernels.linear_softmax import default_chunk_bytes
from srlm_fast.kernels.softmax_rows import Softmax
from srlm_fast.kernels.vocab_parallel import slice_of_vocabulary, sliced_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    main_grad: Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    check_targets: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(z), z as in the module's formula; differentiable in x and weight.

    The gradients U of the log-probabilities with respect to the logits are kept in the dtype of `weight` while they
    fit into `chunk_bytes`; the backward for any upstream gradient is then two products. Otherwise, or if the entropy
    has a gradient, U is made again chunk by chunk. Nothing waits for the device.

    With a `group` every rank holds a slice of the vocabulary: with C = ceil(vocab_size / ranks), rank r has rows
    [r C, min((r + 1) C, vocab_size)). x, target and the upstream gradients must be the same on all ranks, and so, to
    the bit, are the results and the gradient of x. A chunk of rows costs one all-gather of 16 bytes per row and rank,
    and in the backward one all-reduce of its dX.

    Args:
        x: [N, D] hidden states that predict the targets.
        weight: [V, D] output embedding, x's dtype, contiguous; with `group`, this rank's rows of it.
        target: int64 [N] in [0, V), of the whole vocabulary.
        temperature: divides the (capped) logits.
        softcap: bound of the logits' absolute values, 0 for none (Gemma 2, arXiv:2408.00118).
        return_entropy: also return the entropy of each row's distribution.
        chunk_bytes: largest kept U, and largest logits and U of a chunk; None: 128 MiB on the CPU, else 2 GiB.
        main_grad: fp32 (fp64) [V, D] that the weight's gradient is added to; autograd then gives the weight none.
        group: ranks that share the vocabulary.
        vocab_size: V of the whole vocabulary; needed with `group`.
        check_targets: look for targets out of range on a GPU too, which waits for it. Unnoticed they give NaN.

    Returns:
        [N] in fp32 (fp64 for fp64 input), or with `return_entropy` that and the entropies [N] in nats.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, or (on the CPU) a target outside [0, V).
    """
    chunk_bytes = default_chunk_bytes(x.device) if chunk_bytes is None else chunk_bytes
    softmax = Softmax(temperature, softcap)
    check(x, weight, target, softmax, chunk_bytes, main_grad)
    if group is None:
        check_range(target, weight.shape[0], check_targets)
        target = target.to(x.device, non_blocking=True)
        if not library.fused():
            loss, entropy = reference_losses(x, weight, target, softmax, main_grad)
        else:
            options = {"entropy": return_entropy, "chunk_bytes": chunk_bytes, "main_grad": main_grad}
            loss, entropy = row_losses(x, weight, target, softmax, **options)
    else:
        start, most = slice_of_vocabulary(weight, group, vocab_size)
        check_range(target, vocab_size, check_targets)
        options = {"most": most, "chunk_bytes": chunk_bytes, "main_grad": main_grad, "group": group}
        loss, entropy = sliced_losses(x, weight, target.to(x.device, non_blocking=True) - start, softmax, **options)
    return (-loss, entropy) if return_entropy else -loss


@torch.no_grad()
def log_collisions(x: Tensor, weight: Tensor, target: Tensor, logp: Tensor) -> Tensor:
    """log sum_v p(v)^2 of each row, [N], without gradient: how likely two samples of a token are the same.

    sum_v p^2 = sum_v e^(2 z_v) / (sum_v e^(z_v))^2, and the first is the normaliser at half the temperature, so it is
    2 log p(y) - log p'(y) with p' = softmax(2 z), whatever y is: one more forward pass of the head, 2NDV.

    Args:
        x, weight, target: as of `linear_logprob`.
        logp: what that gave for them, at temperature 1.
    """
    return 2 * logp.detach() - linear_logprob(x, weight, target, temperature=0.5)
