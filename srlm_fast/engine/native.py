"""Continuous batching over a key/value cache, on our own Llama: for CPUs, tests and small models.

Rows of the running batch are dense: rows 0..active-1 are sequences being decoded, and when one finishes the last one
moves into its place. Prompts run packed, several at once; the samples of a request share one such run and copy its
keys and values.

What a result depends on. Sampling depends on the request alone (see sampling.py). The arithmetic of a row does not
depend on its neighbours either: prompts are attended to one by one, a row attends to its own prefix only, and matrices
are padded to a multiple of `ROW_MULTIPLE` rows, from where on the CPU's matrix products round a row alike however many
rows there are. So in fp32 on one CPU, tokens and log-probabilities are the same to the last bit in any order, company
and batch size. Tests hold it to that; it was measured with MKL on one and two threads. Between machines, numbers of
threads or devices they agree to rounding, so a sampled token may differ once in a great while.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from srlm_fast.checkpoint import load_model
from srlm_fast.engine.base import Completion, EngineStats, Request, check_request
from srlm_fast.engine.kv_cache import KVCache, PromptAttention
from srlm_fast.engine.rows import Rows
from srlm_fast.engine.sampling import sample, sample_keys
from srlm_fast.errors import UserError
from srlm_fast.model import Llama

ROW_MULTIPLE = 16
"""Matrices have a multiple of this many rows: measured with MKL, rounding is the same from 4 (two threads: 12) on."""


@dataclass(eq=False)
class _Sample:
    """One completion to be made, with what its row starts from."""

    name: str
    request: Request
    index: int
    key: Tensor  # int64 scalar, see sample_keys
    logits: Tensor  # [V], after the prompt
    keys: Tensor  # [layers, P, H_kv, head_dim], of the prompt
    values: Tensor


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
        if self._layout != kept:
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
        """What the cache is made for: configuration, device and dtype of the model."""
        if self.model is None:
            return None
        head = self.model.lm_head.weight
        return self.model.config, head.device, head.dtype

    def _under_way(self) -> bool:
        return bool(self._waiting or self._ready or self._running)

    def _reset(self) -> None:
        """Drops all requests and what the cache holds."""
        self._waiting: deque[tuple[str, Request]] = deque()  # to be prefilled
        self._ready: deque[_Sample] = deque()  # prefilled, waiting for a row
        self._running: list[_Sample] = []  # by row
        self._cache = self._rows = None
        if self._layout is not None:
            config, self.device, dtype = self._layout
            slots = _padded(self.max_batch)  # padding rows write to slots of their own
            self._cache = KVCache(config, slots, self.device, dtype)
            self._rows = Rows(slots, self.device)

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
        """Admits what fits, then one token for every row; the samples that ended in this step."""
        finished = self._admit()
        if self._running:
            finished += self._decode()
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
        room = [min(s.request.max_new_tokens, self.max_len - s.keys.shape[1]) for s in samples]
        self._cache.reserve(max(s.keys.shape[1] + r for s, r in zip(samples, room)))
        for row, s in enumerate(samples, first):
            self._cache.fill(row, s.keys, s.values)
        self._rows.start(
            rows,
            requests=[s.request for s in samples],
            lengths=[s.keys.shape[1] for s in samples],
            room=room,
            keys=torch.stack([s.key for s in samples]),
        )
        return self._emit(rows, torch.stack([s.logits for s in samples]))

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
        lengths = [len(request.prompt_ids) for _, request in batch]
        ends = torch.tensor(lengths).cumsum(0)
        # Padding is a last prompt of its own; see the top of this file.
        padding = _padded(n_tokens) - n_tokens
        packed = [*lengths, padding] if padding else lengths
        ids = torch.tensor([t for _, request in batch for t in request.prompt_ids] + [0] * padding)
        positions = torch.cat([torch.arange(length) for length in packed])
        last = torch.zeros(_padded(len(batch)), dtype=torch.int64)
        last[: len(batch)] = ends - 1
        attend = PromptAttention(packed)
        logits = self.model(*(x.to(self.device) for x in (ids, positions)), attend, rows=last.to(self.device))
        keys, values = attend.keys, attend.values
        for i, (name, request) in enumerate(batch):
            prompt = slice(int(ends[i]) - lengths[i], int(ends[i]))
            for index, key in enumerate(sample_keys(request.seed, request.n).to(self.device)):
                self._ready.append(_Sample(name, request, index, key, logits[i], keys[:, prompt], values[:, prompt]))
        self.stats.prompt_tokens += n_tokens

    def _decode(self) -> list[Completion]:
        active, rows = len(self._running), self._rows
        n = _padded(active)
        positions = rows.lengths[:n]
        logits = self.model(rows.last_tokens[:n], positions, self._cache.decode(positions))
        rows.lengths[:active] += 1
        return self._emit(torch.arange(active, device=self.device), logits[:active])

    def _emit(self, rows: Tensor, logits: Tensor) -> list[Completion]:
        """Samples the next token of `rows` from `logits` [N, V]; the samples that this ends."""
        state = self._rows
        logprobs = logits.float().log_softmax(-1)
        tokens = sample(logits, state.temperature[rows], state.top_p[rows], state.keys[rows], state.steps[rows])
        ended = state.append(rows, tokens, logprobs)
        self.stats.generated_tokens += len(rows)
        return self._finish(rows[ended].tolist()) if ended.any() else []

    def _finish(self, ended: list[int]) -> list[Completion]:
        """Takes the rows `ended` out of the batch and closes the holes they leave."""
        completions = []
        for row in ended:
            s = self._running[row]
            tokens, logprobs, extra = self._rows.output(row, len(s.request.logprob_token_ids))
            if not math.isfinite(logprobs[-1]):
                raise UserError(f"{s.name}: the logits of token {len(tokens)} of its answer are NaN; check the weights")
            reason = "stop" if tokens[-1] in s.request.stop_ids else "length"
            completions.append(Completion(s.request, s.index, tokens, logprobs, reason, extra))
        left = len(self._running) - len(ended)
        gone = set(ended)
        holes = [row for row in ended if row < left]
        movers = [row for row in range(left, len(self._running)) if row not in gone]
        if holes:
            source, target = (torch.tensor(x, device=self.device) for x in (movers, holes))
            self._cache.move(source, target, int(self._rows.lengths[source].max()))
            self._rows.move(source, target)
            for hole, mover in zip(holes, movers):
                self._running[hole] = self._running[mover]
        self._rows.clear(left, len(self._running))
        del self._running[left:]
        return completions


def _padded(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
