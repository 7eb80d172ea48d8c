"""Tokens per second of the native engine, for prefill and for decoding at several batch sizes.

    python bench/generate.py                                  # a random Llama of 1M parameters
    python bench/generate.py --weights <folder> --threads 2   # a checkpoint

A row of the table generates `batch` answers of `new` tokens to prompts of `prompt` tokens. The floor beside it is what
the matrix products of the model alone would take (decoding: weights times `batch` rows), timed in the same run; the
difference is attention, sampling and Python.
"""

import argparse
import platform
import time

import torch

from srlm_fast.engine import Request, load_engine
from srlm_fast.engine.native import NativeEngine
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.native_ops import native_available

ONE_MILLION = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
)


def requests(batch: int, prompt: int, new: int, vocab_size: int) -> list[Request]:
    ids = torch.randint(vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch)).tolist()
    return [Request(row, temperature=0.7, top_p=0.9, max_new_tokens=new, seed=i) for i, row in enumerate(ids)]


def seconds_to_generate(engine: NativeEngine, batch: int, prompt: int, new: int, repeats: int = 3) -> float:
    """Best of `repeats`, as the machine may have other work."""
    vocab_size = engine.model.config.vocab_size
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in engine.stream(requests(batch, prompt, new, vocab_size)):
            pass
        best = min(best, time.perf_counter() - started)
    return best


@torch.inference_mode()
def matmul_seconds(model: Llama, rows: int, repeats: int = 10) -> float:
    """The matrix products of one forward pass over `rows` tokens."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in weights]
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for x, weight in zip(inputs, weights):
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    engine = load_engine("native", max_batch=max(args.batch))
    if args.weights:
        engine.load(args.weights)
    else:
        model = Llama(ONE_MILLION)
        model.init_weights(torch.Generator().manual_seed(0))
        engine.load(model)
    seconds_to_generate(engine, 1, args.prompt, 1, repeats=1)
    started = time.perf_counter() - started
    model = engine.model
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, fp32, {args.threads} threads, torch {torch.__version__}, {platform.machine()}")
    print(f"native operators: {native_available()}; first token after {started:.2f} s; T 0.7, top-p 0.9")
    print("batch prompt  new prefill tok/s decode tok/s ms/step floor ms")
    for batch in args.batch:
        prefill = seconds_to_generate(engine, batch, args.prompt, 1)
        decode = seconds_to_generate(engine, batch, args.prompt, args.new) - prefill
        step = decode / (args.new - 1)
        rates = f"{batch * args.prompt / prefill:13,.0f} {batch / step:12,.0f}"
        floor = matmul_seconds(model, batch)
        print(f"{batch:5} {args.prompt:6} {args.new:4} {rates} {step * 1e3:7.2f} {floor * 1e3:8.2f}", flush=True)


if __name__ == "__main__":
    main()
