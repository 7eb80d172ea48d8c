"""Every operator against its peers and its floor: time, peak memory and error, side by side in one process.

    python bench/kernels.py --device cpu --threads 2                     # all operators
    python bench/kernels.py --operators linear_logprob --dtypes bfloat16
    python bench/kernels.py --device cuda

A time is one forward and backward (for AdamW one step): the median of alternating rounds, with the 20th and 80th
percentile. `floor` is what the operator cannot avoid, timed in the same rounds: the three matrix products of an LM head
by torch.mm, the seven products of attention over as many keys as are seen, or a copy of as many bytes as must be read
and written. Peers that are not installed are left out; install
them with `pip install -e ".[bench]"`. Extra memory is the peak above what was allocated before, less the gradients that
are left at the end, for ours and for peers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import measure
import peers
import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.attention import Segments, varlen_attention
from srlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from srlm_fast.kernels.linear_logprob import linear_logprob
from srlm_fast.kernels.optimizer import AdamW
from srlm_fast.kernels.preference import preference_loss
from srlm_fast.kernels.rms_norm import add_rms_norm, rms_norm
from srlm_fast.kernels.rotary import rotary, rotary_table
from srlm_fast.kernels.swiglu import swiglu

CPU_HEADS = [(2048, 288, 32000), (2048, 512, 32000), (2048, 1024, 32000)]
CUDA_HEADS = [
    (4096, 4096, 32000),
    (8192, 4096, 32000),
    (16384, 4096, 32000),
    (4096, 4096, 128256),
    (8192, 4096, 128256),
]
CPU_ROWS = [(4096, 128), (2048, 288), (2048, 1024)]
CUDA_ROWS = [(8192, 4096), (8192, 5120), (8192, 8192)]
CPU_HEAD_SHAPES, CUDA_HEAD_SHAPES = [(12, 12, 64), (32, 8, 64)], [(32, 32, 128), (32, 8, 128)]
"""Heads of queries, heads of keys, head_dim."""
BLOCK = 256
"""Queries of which the floor of attention takes the products at a time; half of their own keys count as seen."""
LITTLE, MUCH = 32 << 20, 2 << 30
"""chunk_bytes for an LM head on the CPU that is to use little memory, or may keep all unit gradients."""


@dataclass
class Case:
    """One operator at one shape: what is run, what it cannot avoid, and how far each is from float64."""

    operator: str
    shape: str
    runs: dict[str, measure.Run]
    floor: measure.Run
    errors: dict[str, str] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    """Runs of many seconds, of which one is enough."""


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None) -> measure.Run:
    """A run of the function and of its backward, which returns the gradients."""

    def run() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return torch.autograd.grad(out, [x for x in inputs if x.requires_grad], upstream)

    return run


def head_case(operator: str, n: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    """linear_logprob with per-token gradients, or linear_cross_entropy with the mean."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device, generator=generator) * d**-0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), device=device, generator=generator)
    heads: dict[str, peers.Head] = {}
    if operator == "linear_logprob":
        heads["ours"] = linear_logprob
        if device.type == "cpu":
            heads["ours, U kept"] = lambda x, w, t: linear_logprob(x, w, t, chunk_bytes=MUCH)
            heads["ours, little memory"] = lambda x, w, t: linear_logprob(x, w, t, chunk_bytes=LITTLE)
        heads |= peers.logprob_heads(device)
        upstream = torch.randn(n, device=device, generator=generator)
    else:
        heads["ours"] = linear_cross_entropy
        if device.type == "cpu":
            heads["ours, little memory"] = lambda x, w, t: linear_cross_entropy(x, w, t, chunk_bytes=LITTLE)
        heads |= peers.cross_entropy_heads(device)
        upstream = None
    xd, wd, logits = x.detach(), weight.detach(), torch.randn(n, v, device=device, generator=generator).to(dtype)

    def three_products() -> None:
        torch.mm(xd, wd.t())
        torch.mm(logits, wd)
        torch.mm(logits.t(), xd)

    runs = {name: _head_run(head, x, weight, target, upstream) for name, head in heads.items()}
    errors = _head_errors(heads, x, weight, target, upstream)
    slow = device.type == "cpu" and dtype == torch.bfloat16
    once = tuple(name for name in runs if slow and name == "F.linear_cross_entropy")
    return Case(operator, f"N={n} D={d} V={v}", runs, three_products, errors, once)


def _head_run(head: peers.Head, x: Tensor, weight: Tensor, target: Tensor, upstream: Tensor | None) -> measure.Run:
    def run() -> tuple[Tensor, ...]:
        out = head(x, weight, target)
        return torch.autograd.grad(out, (x, weight), None if upstream is None else upstream.to(out.dtype))

    return run


def _head_errors(
    heads: dict[str, peers.Head], x: Tensor, weight: Tensor, target: Tensor, upstream: Tensor | None
) -> dict[str, str]:
    """Largest error of the values and relative error of dX on the first rows, against float64."""
    rows = 128
    x, weight, target = x[:rows].detach().requires_grad_(), weight.detach(), target[:rows]
    exact_x = x.detach().double().requires_grad_()
    exact = (exact_x @ weight.double().t()).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    if upstream is None:
        exact = -exact.mean()
    gradient = None if upstream is None else upstream[:rows]
    (exact_dx,) = torch.autograd.grad(exact, (exact_x,), gradient if gradient is None else gradient.double())
    errors = {}
    for name, head in heads.items():
        out = head(x, weight, target)
        (dx,) = torch.autograd.grad(out, (x,), gradient if gradient is None else gradient.to(out.dtype))
        value = (out.detach().double() - exact.detach()).abs().max()
        errors[name] = f"{float(value):.0e}, dX {float((dx.double() - exact_dx).norm() / exact_dx.norm()):.0e}"
    return errors


def attention_layouts(device: torch.device) -> dict[str, Segments]:
    """Sequences of their own, and pairs whose responses share a prompt."""
    scale = 8 if device.type == "cuda" else 1
    starts, lengths, spans = [], [], []
    for _ in range(5 * scale):
        prompt = sum(lengths)
        for n in (150, 120, 120):
            start = sum(lengths)
            spans.append([(start, n)] if start == prompt else [(prompt, 150), (start, n)])
            starts.append(start)
            lengths.append(n)
    return {
        f"{4 * scale} x 512": Segments.causal([512] * 4 * scale, device),
        f"{scale} x 2048": Segments.causal([2048] * scale, device),
        f"{5 * scale} pairs of 150 + 2 x 120": Segments(starts, lengths, spans, device),
    }


def attention_case(
    layout: str, segments: Segments, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Causal attention inside segments; the peer is torch's own for one segment after the other."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(n_heads: int) -> Tensor:
        shape = (segments.n_tokens, n_heads, head_dim)
        return torch.randn(*shape, device=device, generator=generator).to(dtype).requires_grad_()

    q, k, v, upstream = randn(heads), randn(kv_heads), randn(kv_heads), randn(heads).detach()

    def in_segments(*qkv: Tensor) -> Tensor:
        return varlen_attention(*qkv, segments)

    def plain(*qkv: Tensor) -> Tensor:
        with library.using("reference"):
            return in_segments(*qkv)

    def results(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors[:-1]]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs[:1], tensors[-1])]

    functions = {"ours": in_segments, "SDPA, a segment after the other": plain}
    y, dq = results(plain, *(x.double() for x in (q, k, v, upstream)))
    errors = {}
    for name, function in functions.items():
        out, d_out = results(function, q, k, v, upstream)
        error = float((out.double() - y).abs().max())
        errors[name] = f"{error:.0e}, dq {float((d_out.double() - dq).norm() / dq.norm()):.0e}"
    blocks = [
        (randn(heads)[:rows].detach().transpose(0, 1), randn(heads)[:seen].detach().transpose(0, 1))
        for n, m in zip(segments.q_lens, segments.k_lens)
        for start in range(0, n, BLOCK)
        for rows in [min(BLOCK, n - start)]
        for seen in [m - n + start + rows // 2]
    ]

    def seven_products() -> None:
        for queries, keys in blocks:
            for _ in range(3):  # the scores, the same once more in the backward, the gradient of the probabilities
                scores = queries @ keys.mT
            for _ in range(2):  # y, dq
                scores @ keys
            for _ in range(2):  # dk, dv
                scores.mT @ queries

    runs = {name: forward_backward(f, [q, k, v], upstream) for name, f in functions.items()}
    shape = f"{layout}, {heads} heads on {kv_heads} of {head_dim}"
    return Case("attention", shape, runs, seven_products, errors)


def copy_of(n_bytes: int, device: torch.device) -> measure.Run:
    """Reads and writes `n_bytes` in all."""
    source = torch.zeros(max(1, n_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def eager_and_compiled(function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """An operator, and torch's two ways to run its formula."""
    torch.compiler.reset()  # every case is compiled afresh, however many there were before
    compiled = torch.compile(function)

    def in_plain_torch(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reference(*args: Tensor) -> Tensor:
            with library.using("reference"):
                return run(*args)

        return reference

    return {"ours": function, "torch eager": in_plain_torch(function), "torch.compile": in_plain_torch(compiled)}


def row_cases(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The operators between the matrix products, at one width."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype).requires_grad_()

    size, shape = rows * d * torch.finfo(dtype).bits // 8, f"[{rows}, {d}]"
    x, delta, weight, upstream = randn(rows, d), randn(rows, d), randn(d), randn(rows, d).detach()
    functions = eager_and_compiled(lambda x, w: rms_norm(x, w, 1e-5))
    functions["F.rms_norm"] = lambda x, w: F.rms_norm(x, (d,), w, 1e-5)
    runs = {name: forward_backward(f, [x, weight], upstream) for name, f in functions.items()}
    yield Case("rms_norm", shape, runs, copy_of(5 * size, device))

    functions = eager_and_compiled(lambda x, r, w: sum(add_rms_norm(x, r, w, 1e-5)))
    runs = {name: forward_backward(f, [x, delta, weight], upstream) for name, f in functions.items()}
    yield Case("add_rms_norm (and their sum)", shape, runs, copy_of(12 * size, device))

    functions = eager_and_compiled(swiglu)
    runs = {name: forward_backward(f, [x, delta], upstream) for name, f in functions.items()}
    yield Case("swiglu", shape, runs, copy_of(8 * size, device))

    head_dim = 32 if d % 128 else 128
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    cos, sin = rotary_table(torch.arange(rows, device=device), inv_freq)
    # The identity product stands for the projections, whose results the operator may overwrite.
    functions = eager_and_compiled(lambda q, k: torch.cat(rotary(q * 1, k * 1, cos, sin, head_dim), 1))
    both = torch.cat((upstream, upstream), 1)
    runs = {name: forward_backward(f, [x, delta], both) for name, f in functions.items()}
    yield Case("rotary (and a product, a concatenation)", shape, runs, copy_of(20 * size, device))


def preference_case(pairs: int, tokens: int, device: torch.device) -> Case:
    """The DPO loss of `pairs` pairs with responses of `tokens` tokens, from token log-probs."""
    generator = torch.Generator(device).manual_seed(0)
    logps = (-torch.rand(2 * pairs * tokens, device=device, generator=generator)).requires_grad_()
    lengths = torch.full((2 * pairs,), tokens, device=device)
    reference = -torch.rand(2 * pairs, device=device, generator=generator) * tokens
    upstream = torch.full((pairs,), 1 / pairs, device=device)
    functions = eager_and_compiled(
        lambda logps: preference_loss(logps, lengths, reference, kind="sigmoid", beta=0.1)[0]
    )
    runs = {name: forward_backward(f, [logps], upstream) for name, f in functions.items()}
    return Case("preference_loss", f"{pairs} pairs of 2 x {tokens}", runs, copy_of(logps.numel() * 8, device))


def adamw_case(sizes: list[tuple[int, ...]], device: torch.device) -> Case:
    """One optimizer step over parameters of these shapes, fp32."""
    runs: dict[str, measure.Run] = {}
    makers = {
        "ours": lambda p: AdamW(p, lr=1e-3),
        "ours, bf16 moments": lambda p: AdamW(p, lr=1e-3, moments="bf16"),
        "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "torch foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    }
    for name, make in makers.items():
        parameters = [torch.randn(size, device=device).requires_grad_() for size in sizes]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = make(parameters)
        optimizer.step()
        runs[name] = optimizer.step
    count = sum(torch.Size(size).numel() for size in sizes)
    return Case("adamw step", f"{count / 1e6:.1f}M parameters", runs, copy_of(count * 28, device))


def cases(operators: list[str], dtypes: list[torch.dtype], device: torch.device) -> Iterator[Case]:
    """The cases whose operator's name begins with one of `operators`; they are made one at a time."""

    def wanted(name: str) -> bool:
        return not operators or any(name.startswith(operator) for operator in operators)

    cuda = device.type == "cuda"
    for operator in ("linear_logprob", "linear_cross_entropy"):
        for shape in CUDA_HEADS if cuda else CPU_HEADS:
            for dtype in dtypes:
                if wanted(operator):
                    case = head_case(operator, *shape, dtype, device)
                    case.shape += f" {str(dtype)[6:]}"
                    yield case
    for layout, segments in attention_layouts(device).items() if wanted("attention") else ():
        for shape in CUDA_HEAD_SHAPES if cuda else CPU_HEAD_SHAPES:
            for dtype in dtypes:
                case = attention_case(layout, segments, *shape, dtype, device)
                case.shape += f" {str(dtype)[6:]}"
                yield case
    for shape in CUDA_ROWS if cuda else CPU_ROWS:
        for dtype in dtypes:
            for case in row_cases(*shape, dtype, device):
                if wanted(case.operator):
                    case.shape += f" {str(dtype)[6:]}"
                    yield case
    if wanted("preference_loss"):
        yield preference_case(8, 128, device)
        yield preference_case(64, 512, device)
    if wanted("adamw"):
        small = [(1024, 128)] + [(128, 128)] * 16 + [(344, 128)] * 12 + [(128,)] * 9
        yield adamw_case(small, device)
        yield adamw_case([(8192, 1024)] * 6, device)


def print_case(case: Case, rounds: int, device: torch.device) -> None:
    """The case's rows of the table."""
    seconds = measure.alternate({**case.runs, "floor": case.floor}, rounds, device, case.once)
    floor = measure.quantiles(seconds["floor"])[1]
    ours = min(measure.quantiles(seconds[name])[1] for name in case.runs if name.startswith("ours"))
    for name in seconds:
        low, median, high = (s * 1e3 for s in measure.quantiles(seconds[name]))
        single = name in case.once
        peak = measure.peak_bytes(case.runs[name], device) if name in case.runs and not single else None
        memory = "" if peak is None else f"{peak / 2**20:,.0f}"
        spread = "one run" if single else f"{low:,.2f}-{high:,.2f}"
        times = f"{median:,.2f} ({spread}) | {median / 1e3 / floor:.2f} | {median / 1e3 / ours:.2f}"
        print(
            f"| {case.operator} | {case.shape} | {name} | {times} | {memory} | {case.errors.get(name, '')} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; none: torch's own choice")
    parser.add_argument("--operators", nargs="*", default=[], help="beginnings of operator names; none: all")
    parser.add_argument("--dtypes", nargs="*", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each case")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    print(f"{measure.environment(device, peers.PACKAGES)}\n")
    print("| operator | shape | what | ms (p20-p80) | x floor | x ours | extra MiB | error against float64 |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases(args.operators, [getattr(torch, name) for name in names], device):
        print_case(case, args.rounds, device)


if __name__ == "__main__":
    main()
