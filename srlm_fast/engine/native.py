"""Continuous batching over a key/value cache, on our own Llama: for CPUs, tests and small models.

Rows of the running batch are dense: rows 0..active-1 are sequences being decoded, and when one finishes the last one
moves into its place. Prompts run packed, several at once; the samples of a request share one such run. What runs them
is `PackedBatch` (fp32 on a CPU, in C++) or `TorchBatch` (everything else).

What a result depends on. Sampling depends on the request alone (see sampling.py). The arithmetic of a row does not
depend on its neighbours either: a row attends to its own sequence only, every matrix product rounds a row alike however
many rows there are, and keys and values found in the cache are those that would be computed. So in fp32 on one CPU,
tokens and log-probabilities are the same to the last bit in any order, company and batch size. Tests hold both batches
to that. Between the two, and between machines or devices, they agree to rounding, so a sampled token may differ once in
a great while.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srlm_fast.checkpoint import load_model
from srlm_fast.engine import packed
from srlm_fast.engine.base import Completion, EngineStats, Request, check_request
from srlm_fast.engine.sampling import sample_keys
from srlm_fast.engine.torch_batch import TorchBatch
from srlm_fast.errors import UserError
from srlm_fast.model import Llama


@dataclass(eq=False)
class _Sample:
    """One completion to be made, with what its row starts from."""

    name: str
    request: Request
    index: int
    key: Tensor  # int64 scalar, see sample_keys
    prompt: Any  # of the batch


class NativeEngine:
    """The `Engine` over our Llama.

    Args:
        max_batch: sequences decoded at the same time.
        max_len: tokens of prompt and completion together; None takes the model's max_position_embeddings.
        prefill_tokens: prompts are run together up to about this many tokens.
        device: where the model runs.
        dtype: of weights and cache; log-probabilities and sampling are fp32.
    """

    def __init__(
        self,
        *,
        max_batch: int = 128,
        max_len: int | None = None,
        prefill_tokens: int = 4096,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in {"max_batch": max_batch, "max_len": max_len, "prefill_tokens": prefill_tokens}.items():
            if value is not None and value < 1:
                raise UserError(f"native engine: {name}={value} must be 1 or more")
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.device, self.dtype = torch.device(device), dtype
        self.stats = EngineStats()
        self._max_len_option = max_len
        self._n_submitted = 0
        self.model: Llama | None = None
        self._reset()

    def load(self, weights: str | Path | Llama) -> None:
        """See `Engine.load`; a model that is already built is taken as it is and put into evaluation mode."""
        kept = None if self._under_way() else self._layout
        self.model = None  # the old weights go before the new ones come
        if not isinstance(weights, Llama):
            weights = load_model(weights, dtype=self.dtype, device=self.device)
        self.model = weights.eval()
        if kept is not None and self._layout == kept:
            self._batch.reload(self.model)
        else:
            self._reset()

    def push(self, model: nn.Module, folder: str | Path) -> bool:
        """See `Engine.push`: it loads from folders only, being made for models that are read in no time."""
        return False

    def submit(self, requests: Iterable[Request]) -> None:
        """See `Engine.submit`."""
        if self.model is None:
            raise UserError("native engine: no weights; call load() first (sleep() and close() drop them)")
        for request in requests:
            name = f"request {self._n_submitted}"
            check_request(request, name, vocab_size=self.model.config.vocab_size, max_len=self.max_len)
            self._waiting.append((name, request))
            self._n_submitted += 1

    def stream(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """See `Engine.stream`."""
        self.submit(requests)
        return self._drain()

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self.model = None
        self._reset()

    def close(self) -> None:
        """See `Engine.close`."""
        self.sleep()

    @property
    def max_len(self) -> int:
        """Tokens of prompt and completion together that a sequence may have."""
        limit = self.model.config.max_position_embeddings
        return limit if self._max_len_option is None else min(limit, self._max_len_option)

    @property
    def _layout(self) -> tuple | None:
        """What a batch is made for: the shape of the model, where it is, and what runs it."""
        if self.model is None:
            return None
        head = self.model.lm_head.weight
        return self.model.config, head.device, head.dtype, packed.runs(self.model)

    def _under_way(self) -> bool:
        return bool(self._waiting or self._ready or self._running)

    def _reset(self) -> None:
        """Drops all requests and what the cache holds."""
        self._waiting: deque[tuple[str, Request]] = deque()  # to be prefilled
        self._ready: deque[_Sample] = deque()  # prefilled, waiting for a row
        self._running: list[_Sample] = []  # by row
        self._batch = None
        if self.model is not None:
            self.device = self.model.lm_head.weight.device
            batch = packed.PackedBatch if packed.runs(self.model) else TorchBatch
            self._batch = batch(self.model, self.max_batch, self.max_len, self.stats)

    def _drain(self) -> Iterator[Completion]:
        while self._under_way():
            started = time.perf_counter()
            try:
                finished = self._step()
            except BaseException:
                self._reset()
                raise
            self.stats.seconds += time.perf_counter() - started
            yield from finished

    @torch.inference_mode()
    def _step(self) -> list[Completion]:
        """Admits what fits, then goes on with all rows until one ends; the samples that ended in this step."""
        finished = self._admit()
        if self._running:
            finished += self._finish(self._batch.decode(len(self._running)).nonzero().flatten().tolist())
        return finished

    def _admit(self) -> list[Completion]:
        """Gives free rows to waiting samples, a few at a time so that prompts run together."""
        free = self.max_batch - len(self._running)
        if not (self._ready or self._waiting) or (self._running and free < max(1, self.max_batch // 8)):
            return []
        while self._waiting and len(self._ready) < free:
            self._prefill(free - len(self._ready))
        samples = [self._ready.popleft() for _ in range(min(free, len(self._ready)))]
        first = len(self._running)
        rows = torch.arange(first, first + len(samples), device=self.device)
        self._running += samples
        requests = [s.request for s in samples]
        lengths = [len(request.prompt_ids) for request in requests]
        room = [min(request.max_new_tokens, self.max_len - length) for request, length in zip(requests, lengths)]
        self._batch.start(first, [s.prompt for s in samples], room)
        keys = torch.stack([s.key for s in samples])
        self._batch.rows.start(rows, requests=requests, lengths=lengths, room=room, keys=keys)
        ended = self._batch.emit(rows, torch.stack([s.prompt.logits for s in samples]))
        return self._finish(rows[ended].tolist())

    def _prefill(self, wanted: int) -> None:
        """Runs waiting prompts, packed, until `wanted` samples or the token budget are reached."""
        batch: list[tuple[str, Request]] = []
        n_tokens = n_samples = 0
        while self._waiting and n_samples < wanted:
            length = len(self._waiting[0][1].prompt_ids)
            if batch and n_tokens + length > self.prefill_tokens:
                break
            batch.append(self._waiting.popleft())
            n_tokens += length
            n_samples += batch[-1][1].n
        prompts = self._batch.prefill([request for _, request in batch])
        for (name, request), prompt in zip(batch, prompts):
            for index, key in enumerate(sample_keys(request.seed, request.n).to(self.device)):
                self._ready.append(_Sample(name, request, index, key, prompt))

    def _finish(self, ended: list[int]) -> list[Completion]:
        """Takes the rows `ended` out of the batch and closes the holes they leave."""
        completions = []
        for row in ended:
            s = self._running[row]
            tokens, logprobs, extra = self._batch.rows.output(row, len(s.request.logprob_token_ids))
            if not math.isfinite(logprobs[-1]):
                raise UserError(f"{s.name}: the logits of token {len(tokens)} of its answer are NaN; check the weights")
            reason = "stop" if tokens[-1] in s.request.stop_ids else "length"
            completions.append(Completion(s.request, s.index, tokens, logprobs, reason, extra))
            self._batch.release(row)
        left = len(self._running) - len(ended)
        gone = set(ended)
        holes = [row for row in ended if row < left]
        movers = [row for row in range(left, len(self._running)) if row not in gone]
        if holes:
            self._batch.move(torch.tensor(movers, device=self.device), torch.tensor(holes, device=self.device))
            for hole, mover in zip(holes, movers):
                self._running[hole] = self._running[mover]
        self._batch.rows.clear(left, len(self._running))
        del self._running[left:]
        return completions
