"""linear_logprob over a vocabulary that several ranks share, against the same on one rank; run under torchrun."""

import itertools

import pytest
import torch
import torch.distributed as dist
from head_case import make
from kernel_case import ROUNDING, relative_error, running

from srlm_fast.kernels.linear_logprob import linear_logprob
from srlm_fast.kernels.linear_softmax import CHUNK_BYTES
from srlm_fast.parallel import World

DTYPES = (torch.float32, torch.bfloat16)
SMALL = 3000
"""chunk_bytes that make several chunks. Slices of 65 and 64 columns differ in padded width; their chunks must not."""


def compare(case, vocab_size: int, chunk_bytes: int, with_main_grad: bool, options: dict) -> None:
    rank, per_rank = dist.get_rank(), -(-vocab_size // dist.get_world_size())
    own = slice(rank * per_rank, min((rank + 1) * per_rank, vocab_size))
    weight = case.weight.detach()[own].clone().requires_grad_(case.weight.requires_grad)
    main_grad = torch.zeros(weight.shape) if with_main_grad else None
    shared = {"chunk_bytes": chunk_bytes, "return_entropy": True, **options}
    mine = linear_logprob(
        case.x, weight, case.target, group=dist.group.WORLD, vocab_size=vocab_size, main_grad=main_grad, **shared
    )
    whole = linear_logprob(*case[:3], **shared)
    inputs = [t for t in (case.x, case.weight) if t.requires_grad]
    for upstream in ((case.grad, None), (case.grad, case.grad.flip(0))):
        outputs = [(logp, entropy)[: 1 if upstream[1] is None else 2] for logp, entropy in (mine, whole)]
        grads = [g for g in upstream if g is not None]
        expected = torch.autograd.grad(outputs[1], inputs, grads, retain_graph=True)
        inputs_of_mine = [weight if t is case.weight else t for t in inputs]
        if main_grad is not None:
            main_grad.zero_()
        got = torch.autograd.grad(outputs[0], inputs_of_mine, grads, retain_graph=True, allow_unused=with_main_grad)
        for g, e, t in zip(got, expected, inputs):
            if t is case.weight:
                assert (g is None) == with_main_grad
                g, e = main_grad if with_main_grad else g, e[own]
            else:
                assert_same_on_all_ranks(g)
            assert relative_error(g, e) < 2 * ROUNDING[case.x.dtype]
    for a, b in zip(mine, whole):
        assert relative_error(a, b) < 1e-6
        assert_same_on_all_ranks(a)


def assert_same_on_all_ranks(value: torch.Tensor) -> None:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    for part in parts:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World()
    for dtype, vocab_size, chunk_bytes in itertools.product(DTYPES, (129, 200), (CHUNK_BYTES, SMALL)):
        case = make(12, 16, vocab_size, dtype)
        with running("torch"):
            for with_main_grad in (False, True):
                compare(case, vocab_size, chunk_bytes, with_main_grad, {})
            compare(case, vocab_size, chunk_bytes, False, {"temperature": 0.7, "softcap": 5.0})
            for part in ("x", "weight"):
                compare(case._replace(**{part: getattr(case, part).detach()}), vocab_size, chunk_bytes, False, {})
        if chunk_bytes == SMALL:
            with running("triton"):
                compare(case, vocab_size, chunk_bytes, False, {"temperature": 0.7, "softcap": 5.0})
    empty = make(0, 4, 9)
    own = empty.weight.detach().tensor_split(world.size)[world.rank].clone().requires_grad_()
    logp = linear_logprob(empty.x, own, empty.target, group=dist.group.WORLD, vocab_size=9)
    assert logp.shape == (0,) and not torch.autograd.grad(logp.sum(), own)[0].any()
    for vocab_size, says in (
        (None, "vocab_size.*None"),
        (1, "vocab_size.*got 1"),
        (20, "must hold rows.*of vocab_size 20"),
    ):
        with pytest.raises(ValueError, match=says):
            linear_logprob(empty.x, own, empty.target, group=dist.group.WORLD, vocab_size=vocab_size)
    print("all agree")
    world.exit(0)
