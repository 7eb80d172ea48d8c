"""vLLM behind the engine protocol, in the process that also trains.

Under torchrun every process holds one vLLM worker (`external_launcher`): `tensor_parallel` consecutive ranks of a node
share a replica of the model, and there are as many replicas as such groups. All ranks of a group submit the same
requests in the same order; before every step they compare what they have seen, so that a difference is an error and not
garbage. `load` and `push` concern all ranks of the run.

Weights come from outside: vLLM starts from a config.json with dummy weights, once per process, and takes new ones from
a model folder (`load`) or from the trainer's shards (`push`). On CUDA it sleeps while the trainer has the GPU. The
order, which methods keep: wake the weights, push, reset the prefix cache, wake the cache of keys and values, generate,
sleep.

Sampling of a completion has a random stream of its own, from the seed of its request and its index. Its arithmetic
depends on its company in the batch to rounding only; a sampled token may differ between runs once in a great while.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from srlm_fast.checkpoint import read_config, read_tensors
from srlm_fast.engine.base import Completion, EngineStats, Request, check_request
from srlm_fast.engine.vllm_process import (
    LogTail,
    check_installed,
    installation,
    remove_shared_memory,
    set_environment,
    undisturbed,
)
from srlm_fast.engine.vllm_weights import (
    Probe,
    check_names,
    counted,
    expected_shapes,
    take_probe,
    untied,
)
from srlm_fast.errors import UserError
from srlm_fast.model import LlamaConfig
from srlm_fast.parallel import sharding_of, whole_tensors
from srlm_fast.seeds import derive_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_BLOCK_SIZE = 32
"""Tokens per block of the cache. vLLM takes 128 on CPUs; what prompts share beyond whole blocks is computed again."""
CPU_BATCH_TOKENS = 4096
"""Prompt tokens of one step on a CPU, at most."""


class VllmEngine:
    """The `Engine` over vLLM. It is started by the first `load`.

    Args:
        max_batch: sequences decoded at the same time.
        max_len: tokens of prompt and completion together; None takes the model's max_position_embeddings.
        tensor_parallel: ranks that share a replica.
        kv_cache_gib: GiB of keys and values in every process.
        dtype: float32, bfloat16 or float16 for weights and cache; auto is bfloat16 on CUDA and float32 on a CPU.
        enforce_eager: neither CUDA graphs nor torch.compile.
        device: where it runs.

    Raises:
        UserError: when vLLM is not installed, or `tensor_parallel` does not divide the ranks of a node.
    """

    def __init__(
        self,
        *,
        max_batch: int = 128,
        max_len: int | None = None,
        tensor_parallel: int = 1,
        kv_cache_gib: float = 8.0,
        dtype: str = "auto",
        enforce_eager: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        check_installed(self.cuda)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local % tensor_parallel:
            raise UserError(
                f"engine.tensor_parallel={tensor_parallel} does not divide the {local} processes of a node; a replica "
                "lies within one node"
            )
        self.tensor_parallel, self.max_batch, self._max_len_option = tensor_parallel, max_batch, max_len
        self.dtype = DTYPES[dtype if dtype != "auto" else "bfloat16" if self.cuda else "float32"]
        self.kv_cache_bytes, self.enforce_eager = int(kv_cache_gib * 2**30), enforce_eager
        self.stats = EngineStats()
        self.config: LlamaConfig | None = None
        self._llm: Any = None
        self._log = LogTail()
        self._n_submitted = 0
        self._under_way: dict[str, tuple[str, Request, int]] = {}  # vLLM's request id -> name, request, index
        self._seen = _digest()  # of requests and tokens so far, the same on all ranks of a group
        self._asleep: set[str] = set()  # of "weights", "kv_cache"
        self._has_weights = False
        self._probe: tuple[Path, Probe] | None = None  # of a folder; compared before the first request
        self._failed: str | None = None

    # ------------------------------------------------------------------------------------------------------- protocol

    def load(self, weights: str | Path) -> None:
        """See `Engine.load`. All ranks call it; the first call starts vLLM.

        Raises:
            UserError: for a folder that `checkpoint.read_tensors` refuses, or a model of another shape than before.
        """
        config = read_config(weights)
        if self._llm is None:
            self._start(Path(weights), config)
        self._check_shape(config, str(weights))
        tensors = read_tensors(weights, self.dtype)
        probe = self._probe if self._probe and self._probe[0] == Path(weights) else None
        self._receive(chain([next(tensors)], tensors))  # the first one: a bad folder is refused with nothing changed
        self._probe = probe

    def push(self, model: nn.Module, folder: str | Path) -> bool:
        """See `Engine.push`. All ranks call it. Before the first request the served weights are compared with these.

        Raises:
            UserError: with the names of tensors that are missing, unknown or of another shape; nothing is changed then.
        """
        check_names(sharding_of(model).shapes(), expected_shapes(model.config))
        started = self._llm is not None
        if started:
            self._check_shape(model.config, "the model")
            self._receive(whole_tensors(model, self.dtype))
        self._probe = Path(folder), take_probe(model)
        return started  # if not, it starts when the trainer's memory is free again

    def submit(self, requests: Iterable[Request]) -> None:
        """See `Engine.submit`; also when the weights that it serves are not those that were pushed."""
        self._make_ready()
        for request in requests:
            name = f"request {self._n_submitted}"
            check_request(request, name, vocab_size=self.config.vocab_size, max_len=self.max_len)
            for index in range(request.n):
                self._add(f"{self._n_submitted}-{index}", name, request, index)
            self._n_submitted += 1

    def stream(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """See `Engine.stream`."""
        self.submit(requests)
        return self._drain()

    def sleep(self) -> None:
        """See `Engine.sleep`; on a CPU vLLM keeps its memory."""
        self._drop()
        self._has_weights = False
        if self._llm is None or self._asleep:
            return
        if self.cuda:
            self._guarded(lambda: self._llm.sleep(level=2))
        self._asleep = {"weights", "kv_cache"}

    def close(self) -> None:
        """See `Engine.close`. This also ends torch.distributed in this process."""
        if self._llm is None:
            return
        self._drop()
        llm, self._llm, self._has_weights = self._llm, None, False
        self._failed = "it was closed"
        llm.llm_engine.engine_core.shutdown()

    @property
    def max_len(self) -> int:
        """Tokens of prompt and completion together that a sequence may have."""
        limit = self.config.max_position_embeddings
        return limit if self._max_len_option is None else min(limit, self._max_len_option)

    # ----------------------------------------------------------------------------------------------- starting, weights

    def _start(self, folder: Path, config: LlamaConfig) -> None:
        if self._failed:
            raise UserError(f"vllm engine: {self._failed}; start the run again")
        heads = config.num_attention_heads
        if heads % self.tensor_parallel:
            raise UserError(f"engine.tensor_parallel={self.tensor_parallel} does not divide the model's {heads} heads")
        self.config = config
        set_environment(self.cuda)
        distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
        options = {"distributed_executor_backend": "external_launcher"} if distributed else {}
        if self.cuda:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            # vLLM refuses to start unless this share is free; what it takes is kv_cache_memory_bytes.
            options |= {"enable_sleep_mode": True, "gpu_memory_utilization": min(0.9, 0.95 * free / total)}
        else:
            options["block_size"] = CPU_BLOCK_SIZE
            # Prompts in pieces would have it rewind random generators, which those of a CPU cannot (0.32).
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCH_TOKENS, self.max_len)}
            remove_shared_memory(self.tensor_parallel)
        try:
            with undisturbed():
                from vllm import LLM

                self._log.attach()
                self._llm = LLM(
                    model=str(folder),
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    hf_overrides={"tie_word_embeddings": False},  # see `untied`
                    generation_config="vllm",  # not the folder's: it would change how requests are sampled
                    dtype=str(self.dtype).removeprefix("torch."),
                    tensor_parallel_size=self.tensor_parallel,
                    seed=int(os.environ.get("RANK", "0")) // self.tensor_parallel,
                    max_model_len=self.max_len,
                    max_num_seqs=self.max_batch,
                    kv_cache_memory_bytes=self.kv_cache_bytes,
                    enable_prefix_caching=True,
                    logprobs_mode="raw_logprobs",
                    enforce_eager=self.enforce_eager,
                    **options,
                )
                self._log.attach()  # vLLM has set its logging up anew
            if not self.cuda:
                remove_shared_memory(self.tensor_parallel)
        except Exception as error:
            raise UserError(
                f"vllm cannot start ({type(error).__name__}: {error}); if memory is short lower engine.kv_cache_gib or "
                f"raise engine.tensor_parallel, if a package is missing: {installation(self.cuda)}.{self._log.shown()}"
            ) from error

    def _check_shape(self, config: LlamaConfig, what: str) -> None:
        no_ids = {"bos_token_id": None, "eos_token_id": None}
        if replace(config, **no_ids) != replace(self.config, **no_ids):
            raise UserError(
                f"vllm engine: {what} has another shape than the model it was started with; a process serves one shape"
            )

    def _receive(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replaces the weights; wakes their memory first."""
        self._drop()
        self._has_weights, self._probe = False, None
        self._wake("weights")
        arguments = {"weights_iterator": untied(counted(tensors, expected_shapes(self.config)), self.config)}
        self._guarded(lambda: self._llm.collective_rpc("reload_weights", kwargs=arguments))
        if not self._guarded(self._llm.reset_prefix_cache):
            raise UserError("vllm engine: the prefix cache of the old weights is in use and cannot be emptied")
        if self.cuda:
            torch.cuda.synchronize(self.device)  # the trainer's collectives end before vLLM's own begin
        self._has_weights = True

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            if self.cuda:
                torch.cuda.empty_cache()
                self._guarded(lambda: self._llm.wake_up(tags=[what]))
            self._asleep.discard(what)

    def _make_ready(self) -> None:
        """Refuses to generate without weights, wakes the cache, and compares a push with what is served."""
        if self._failed:
            raise UserError(f"vllm engine: {self._failed}; start the run again")
        if not self._has_weights:
            why = "it is asleep" if self._asleep else "it has no weights"
            raise UserError(f"vllm engine: {why}; call load() or push() first (sleep() drops weights)")
        self._wake("kv_cache")
        if self._probe is not None:
            (_, probe), self._probe = self._probe, None
            served = self._prompt_logprobs(probe.ids)
            self._has_weights = False
            probe.check(served, self.dtype)
            self._has_weights = True

    def _prompt_logprobs(self, ids: list[int]) -> list[float]:
        """Log-probs of ids[1:]."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        engine, logprobs = self._llm.llm_engine, None
        self._guarded(lambda: engine.add_request("probe", tokens_input(ids), params))
        while engine.has_unfinished_requests():
            for output in self._guarded(engine.step):
                logprobs = output.prompt_logprobs or logprobs
        return [place[token].logprob for place, token in zip(list(logprobs)[1:], ids[1:], strict=True)]

    # ------------------------------------------------------------------------------------------------------ generation

    def _add(self, key: str, name: str, request: Request, index: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        wanted = list(dict.fromkeys(request.logprob_token_ids))
        try:
            params = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=min(request.max_new_tokens, self.max_len - len(request.prompt_ids)),
                seed=derive_seed(request.seed, index),
                stop_token_ids=list(request.stop_ids),
                ignore_eos=True,  # stop_ids alone say where to stop
                logprobs=len(wanted),
                logprob_token_ids=wanted or None,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except Exception as error:  # a temperature above 2, more than 128 wanted log-probs
            raise UserError(f"{name}: vllm does not serve it: {error}") from error
        prompt = tokens_input(list(request.prompt_ids))
        self._guarded(lambda: self._llm.llm_engine.add_request(key, prompt, params))
        self._under_way[key] = name, request, index
        self._saw(key, request.prompt_ids, params.seed, params.max_tokens, params.temperature, params.top_p)

    def _drain(self) -> Iterator[Completion]:
        while self._under_way:
            started = time.perf_counter()
            try:
                finished = self._step()
            except BaseException:
                self._drop()
                raise
            self.stats.seconds += time.perf_counter() - started
            yield from finished

    def _step(self) -> list[Completion]:
        """One token for every running sequence; those that ended."""
        if self.tensor_parallel > 1:
            self._compare()
        outputs = self._guarded(self._llm.llm_engine.step)
        return [self._completion(output) for output in outputs if output.request_id in self._under_way]

    def _completion(self, output: Any) -> Completion:
        name, request, index = self._under_way.pop(output.request_id)
        (made,) = output.outputs
        tokens, flat = list(made.token_ids), made.logprobs
        self._saw(output.request_id, tokens)
        logprobs = [flat.logprobs[start] for start in flat.start_indices]  # the sampled token comes first
        if max(tokens) >= self.config.vocab_size:
            raise UserError(f"{name}: vllm sampled token {max(tokens)}, outside 0..{self.config.vocab_size - 1}")
        if not all(map(math.isfinite, logprobs)):
            raise UserError(f"{name}: a log-prob of its answer is not finite; check the weights")
        extra = []
        if request.logprob_token_ids:
            width = 1 + len(set(request.logprob_token_ids))  # what follows is padding
            rows = [slice(start, start + width) for start in flat.start_indices]
            by_token = [dict(zip(flat.token_ids[row], flat.logprobs[row])) for row in rows]
            extra = [[values[token] for token in request.logprob_token_ids] for values in by_token]
        cached = output.num_cached_tokens or 0
        self.stats.cached_tokens += cached
        self.stats.prompt_tokens += len(request.prompt_ids) - cached
        self.stats.generated_tokens += len(tokens)
        reason = "stop" if tokens[-1] in request.stop_ids else "length"
        return Completion(request, index, tokens, logprobs, reason, extra)

    def _drop(self) -> None:
        """Forgets all requests under way."""
        keys, self._under_way = list(self._under_way), {}
        self._seen = _digest()
        if keys and not self._failed:
            self._guarded(lambda: self._llm.llm_engine.abort_request(keys))

    def _saw(self, *what: object) -> None:
        if self.tensor_parallel > 1:
            self._seen.update(repr(what).encode())

    def _compare(self) -> None:
        """Stops all ranks of a group when one was asked, or has answered, something else than the others."""
        from vllm.distributed import get_tp_group

        number = int.from_bytes(self._seen.digest()[:7], "little")
        bounds = torch.tensor([number, -number])
        distributed.all_reduce(bounds, distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
        if bounds.sum():
            raise UserError(
                "vllm engine: the ranks that share a replica were given different requests; all of them have to submit "
                "the same, in the same order, with the same seeds"
            )

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Runs something of vLLM; what goes wrong in it ends the engine with the last lines of its log."""
        if self._failed:
            raise UserError(f"vllm engine: {self._failed}; start the run again")
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            self._failed = f"it failed ({type(error).__name__}: {error})"
            raise UserError(
                f"vllm engine: {self._failed}; finished shards are kept, the same command goes on after them."
                f"{self._log.shown()}"
            ) from error


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)
