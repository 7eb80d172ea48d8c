"""Checks of the vLLM engine that need a process of their own; it writes what they found as OUT/rank-N.json.

    python tests/vllm_case.py OUT TENSOR_PARALLEL          one process
    torchrun --nproc-per-node 2 tests/vllm_case.py OUT TENSOR_PARALLEL

vLLM takes many seconds to start and serves one shape per process, so all checks share one engine.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from srlm_fast.checkpoint import save_weights
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.engine import Completion, Request, load_engine
from srlm_fast.engine import vllm as module
from srlm_fast.engine.vllm_weights import take_probe
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.parallel import World, parallelize, shard

CONFIG = LlamaConfig(
    vocab_size=211,  # vLLM pads it to 256
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the least that its CPU kernels have
    max_position_embeddings=320,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)
MAX_LEN = 300


def make_model(seed: int) -> Llama:
    """Weights with logits of some size, so that greedy tokens are not ties."""
    model = Llama(CONFIG, dropout=0.5)  # which must play no part
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(CONFIG.vocab_size) for _ in range(length)]


def results(completions: Iterable[Completion]) -> dict[str, Completion]:
    return {f"{c.request.metadata}/{c.index}": c for c in completions}


def refusal(call: Callable[[], Any]) -> str | None:
    """The message of the UserError that a call ends in; None when it does not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


class Case:
    """Two models, A and B, and the engine. Every method below that is named in `CHECKS` returns what it measured."""

    def __init__(self, out: Path, tensor_parallel: int) -> None:
        self.out, self.world = out, World()
        self.whole = {name: make_model(i) for i, name in enumerate("AB")}
        self.sharded = {name: shard(make_model(i), self.world).train() for i, name in enumerate("AB")}
        for name, model in self.sharded.items():
            save_weights(model, out / name)
        self.native = load_engine("native", max_batch=16, max_len=MAX_LEN)
        options = {"tensor_parallel": tensor_parallel, "kv_cache_gib": 0.05, "enforce_eager": True}
        self.engine = load_engine("vllm", max_batch=16, max_len=MAX_LEN, **options)

    def greedy(self, engine: Any, length: int = 200) -> list[int]:
        request = Request(prompt(length, seed=3), temperature=0.0, max_new_tokens=24)
        return next(iter(engine.stream([request]))).token_ids

    def push(self, name: str) -> bool:
        return self.engine.push(self.sharded[name], self.out / name)

    def natively(self, name: str) -> list[int]:
        self.native.load(self.out / name)
        return self.greedy(self.native)

    def off(self, name: str, completions: Iterable[Completion]) -> float:
        """Largest difference of completions' log-probs from those of the trainer's model."""
        worst = 0.0
        for c in completions:
            ids = [*c.request.prompt_ids, *c.token_ids]
            expected = take_probe(self.whole[name], ids).logprobs[len(c.request.prompt_ids) - 1 :]
            worst = max(worst, *(abs(a - b) for a, b in zip(c.logprobs, expected, strict=True)))
        return worst

    # ----------------------------------------------------------------------------------------------- in this order

    def without_weights(self) -> Any:
        return {"submit": refusal(lambda: self.engine.submit([])), "push": self.push("A")}

    def start(self) -> Any:
        """What starting it leaves of this process."""

        def state() -> list[Any]:
            return [
                random.getstate(),
                numpy.random.get_state()[1].tolist(),
                torch.get_rng_state().tolist(),
                torch.set_num_threads.__module__,
                torch.get_num_threads(),
                torch.get_default_dtype(),
            ]

        before, started = state(), time.perf_counter()
        self.engine.load(self.out / "A")
        return {"undisturbed": before == state(), "seconds": time.perf_counter() - started}

    def loaded(self) -> Any:
        return {"tokens": self.greedy(self.engine), "native": self.natively("A")}

    def sampled(self) -> Any:
        """Raw log-probs, whatever the temperature; n samples, each with its own stream."""
        requests = [Request(prompt(20 + i, i), 4, 0.7, 0.9, 20, seed=i, metadata=i) for i in range(4)]
        together = results(self.engine.stream(requests))
        alone = {}
        for request in reversed(requests):
            alone |= results(self.engine.stream([request]))
        fewer = results(self.engine.stream([Request(prompt(20, 0), 2, 0.7, 0.9, 20, seed=0, metadata=0)]))
        other = results(self.engine.stream([Request(prompt(20, 0), 2, 0.7, 0.9, 20, seed=99, metadata=0)]))
        tokens = {key: c.token_ids for key, c in together.items()}
        return {
            "off": self.off("A", together.values()),
            "tokens": tokens,
            "alone": {key: alone[key].token_ids for key in tokens},
            "fewer": all(c.token_ids == tokens[key] for key, c in fewer.items()),
            "other": any(c.token_ids == tokens[key] for key, c in other.items()),
            "same seed": all(c.request.seed == int(key[0]) for key, c in together.items()),
        }

    def wanted_logprobs(self) -> Any:
        """Log-probs of given tokens, in a batch with requests that want others or none."""
        wanted = [(), (5, 0, 5, 210), (7,)]
        requests = [Request(prompt(9, i), 1, 1.0, 1.0, 6, i, (), ids, i) for i, ids in enumerate(wanted)]
        worst = 0.0
        for c in self.engine.stream(requests):
            ids = wanted[c.request.metadata]
            assert len(c.extra_logprobs) == (len(c.token_ids) if ids else 0)
            for step, row in enumerate(c.extra_logprobs):
                before = [*c.request.prompt_ids, *c.token_ids[:step]]
                expected = [take_probe(self.whole["A"], [*before, token]).logprobs[-1] for token in ids]
                worst = max(worst, *(abs(a - b) for a, b in zip(row, expected, strict=True)))
        return worst

    def stopping(self) -> Any:
        """The same ends as the native engine, for many stop tokens."""
        self.native.load(self.out / "A")
        stops = tuple(range(0, 211, 9))
        requests = [Request(prompt(12, i), 1, 0.0, 1.0, 40, 0, stops, (), i) for i in range(6)]
        requests += [Request(prompt(290, 0), 1, 0.0, 1.0, 40, metadata="full")]
        ends = []
        for engine in (self.engine, self.native):
            made = results(engine.stream(requests))
            ends.append({key: [c.token_ids, c.finish_reason] for key, c in sorted(made.items())})
        return {"vllm": ends[0], "native": ends[1]}

    def joining(self) -> Any:
        """A request that comes while others run is done before them if it is short."""
        order = []
        lengths = {"long": 60, "short": 3}
        stream = self.engine.stream([Request(prompt(8), 1, 0.0, 1.0, n, metadata=k) for k, n in lengths.items()])
        for c in stream:
            order.append(c.request.metadata)
            if c.request.metadata == "short":
                self.engine.submit([Request(prompt(8, 1), 1, 0.0, 1.0, 3, metadata="late")])
        return order

    def crowded(self) -> Any:
        """More prompt tokens than one step takes, each sampled with its own seed."""
        requests = [Request(prompt(290, i), 1, 0.7, 0.9, 3, i, metadata=i) for i in range(40)]
        made = results(self.engine.stream(requests))
        alone = results(self.engine.stream(requests[-1:]))
        return {"made": len(made), "alone": alone["39/0"].token_ids == made["39/0"].token_ids}

    def refusals(self) -> Any:
        return {
            "long": refusal(lambda: self.engine.submit([Request(prompt(MAX_LEN), metadata="essay")])),
            "id": refusal(lambda: self.engine.submit([Request([211])])),
            "temperature": refusal(lambda: self.engine.submit([Request([1], temperature=3.0)])),
            "shape": self._other_shape(),
            "folder": refusal(lambda: self.engine.load(self.out)),
            "still serves": self.greedy(self.engine),
        }

    def _other_shape(self) -> str | None:
        folder = self.out / f"other-{self.world.rank}"
        folder.mkdir()
        content = json.loads((self.out / "A/config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "vocab_size": 300}))
        return refusal(lambda: self.engine.load(folder))

    def vocabulary(self) -> Any:
        """No token of the padding, even where all are about equally likely."""
        requests = [Request(prompt(5, i), 4, 2.0, 1.0, 60, i) for i in range(4)]
        return max(max(c.token_ids) for c in self.engine.stream(requests))

    def pushed(self) -> Any:
        """New weights, and nothing left of the old ones in the prefix cache."""
        before = self.greedy(self.engine)
        cached = self.engine.stats.cached_tokens
        self.greedy(self.engine)
        cached = self.engine.stats.cached_tokens - cached
        pushed = self.push("B")
        after = self.engine.stats.cached_tokens
        tokens = self.greedy(self.engine)
        return {
            "pushed": pushed,
            "training": self.sharded["B"].training,
            "cached": cached,
            "cached after": self.engine.stats.cached_tokens - after,
            "before": before,
            "tokens": tokens,
            "native": self.natively("B"),
            "off": self.off("B", self.engine.stream([Request(prompt(150), 4, 0.7, 0.9, 30)])),
        }

    def pushed_from_zero(self) -> Any:
        """Weights that DeepSpeed holds in shards, after others."""
        if self.world.size == 1:
            return None
        self.push("A")
        sharded = parallelize(make_model(1), self.world, ParallelConfig(backend="deepspeed", zero_stage=3))
        return {
            "sharded": all(p.numel() == 0 and p.ds_tensor.numel() < p.ds_numel for p in sharded.parameters()),
            "pushed": self.engine.push(sharded, self.out / "B"),
            "tokens": self.greedy(self.engine),
            "off": self.off("B", self.engine.stream([Request(prompt(30), 2, 0.7, 0.9, 20)])),
        }

    def cache_in_use(self) -> Any:
        llm = self.engine._llm
        llm.reset_prefix_cache = lambda: False
        message = refusal(lambda: self.push("B"))
        del llm.reset_prefix_cache
        return {"push": message, "submit": refusal(lambda: self.engine.submit([])), "again": self._recovers()}

    def _recovers(self) -> bool:
        return self.push("B") and self.greedy(self.engine) == self.natively("B")

    def wrong_names(self) -> Any:
        """Refused before anything is changed."""
        self.push("B")
        lacking, renamed = make_model(0), make_model(0)
        del lacking.model.layers[1].mlp.up_proj.weight
        renamed.model.layers[0].mlp.gate = renamed.model.layers[0].mlp.gate_proj
        del renamed.model.layers[0].mlp.gate_proj
        renamed.model.norm.weight = nn.Parameter(torch.ones(3))
        messages = {
            "missing": refusal(lambda: self.engine.push(lacking, self.out / "A")),
            "unknown": refusal(lambda: self.engine.push(renamed, self.out / "A")),
        }
        return {**messages, "still serves": self.greedy(self.engine) == self.natively("B")}

    def cut_off(self) -> Any:
        """Tensors that end too soon, or come twice: refused on the way, and the next push is served."""
        original, messages = module.whole_tensors, {}

        def short(model: nn.Module, dtype: torch.dtype) -> Any:
            return list(original(model, dtype))[:-1]

        def twice(model: nn.Module, dtype: torch.dtype) -> Any:
            tensors = list(original(model, dtype))
            return [*tensors, tensors[0]]

        for name, replacement in {"short": short, "twice": twice}.items():
            module.whole_tensors = replacement
            messages[name] = [refusal(lambda: self.push("A"))]
            module.whole_tensors = original
            messages[name] += [refusal(lambda: self.engine.submit([])), self._recovers()]
        return messages

    def verified(self) -> Any:
        """One tensor that arrives changed: nothing is generated."""
        original = module.whole_tensors

        def changed(model: nn.Module, dtype: torch.dtype) -> Any:
            for name, tensor in original(model, dtype):
                yield name, tensor * (1.02 if name.endswith("0.mlp.up_proj.weight") else 1.0)

        module.whole_tensors = changed
        self.push("B")
        module.whole_tensors = original
        request = [Request(prompt(9))]
        first, second = (refusal(lambda: self.engine.submit(request)) for _ in range(2))
        return {"first": first, "second": second, "again": self._recovers()}

    def asleep(self) -> Any:
        self.engine.submit([Request(prompt(9))])
        self.engine.sleep()
        self.engine.sleep()
        refused = refusal(lambda: self.engine.submit([]))
        dropped = list(self.engine._drain())
        return {"refused": refused, "dropped": len(dropped), "awake": self._recovers()}

    def folder_again(self) -> Any:
        """Weights read from a folder are served as those pushed are."""
        requests = [Request(prompt(30, i), 2, 0.7, 0.9, 20, i, metadata=i) for i in range(4)]
        pushed = results(self.engine.stream(requests))
        self.engine.load(self.out / "A")
        self.engine.load(self.out / "B")
        read = results(self.engine.stream(requests))
        return all(pushed[key].token_ids == read[key].token_ids for key in pushed)

    def divided(self) -> Any:
        """Ranks of one replica that are given different requests."""
        if self.engine.tensor_parallel == 1:
            return None
        message = refusal(lambda: list(self.engine.stream([Request(prompt(9, self.world.rank))])))
        return {"message": message, "again": self.greedy(self.engine) == self.natively("B")}

    def dies(self) -> Any:
        def boom() -> None:
            raise RuntimeError("illegal memory access")

        self.engine._llm.llm_engine.step = boom
        message = refusal(lambda: list(self.engine.stream([Request(prompt(9))])))
        del self.engine._llm.llm_engine.step
        return {"message": message, "after": refusal(lambda: self.engine.submit([]))}


CHECKS = (
    "without_weights",
    "start",
    "loaded",
    "sampled",
    "wanted_logprobs",
    "stopping",
    "joining",
    "crowded",
    "refusals",
    "vocabulary",
    "pushed",
    "pushed_from_zero",
    "cache_in_use",
    "wrong_names",
    "cut_off",
    "verified",
    "asleep",
    "folder_again",
    "divided",
    "dies",
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, tensor_parallel = Path(sys.argv[1]), int(sys.argv[2])
    case, found = Case(out, tensor_parallel), {}
    for check in CHECKS:
        started = time.perf_counter()
        try:
            found[check] = getattr(case, check)()
        except Exception as error:  # the other ranks go on; the test of this check fails
            found[check] = f"{type(error).__name__}: {error}"
        if "-v" in sys.argv:
            print(f"rank {case.world.rank}: {check} {time.perf_counter() - started:.1f} s", flush=True)
    (out / f"rank-{case.world.rank}.json").write_text(json.dumps(found))
    case.engine.close()
    if "RANK" in os.environ:
        case.world.exit(0)
