"""The running batch of any device and dtype, in torch: the model as it is, over a cache of one slot a row.

A matrix is padded to a multiple of `ROW_MULTIPLE` rows, from where on the CPU's products round a row alike however many
rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srlm_fast.engine.base import EngineStats, Request
from srlm_fast.engine.kv_cache import KVCache, PromptAttention
from srlm_fast.engine.rows import Rows
from srlm_fast.engine.sampling import sample
from srlm_fast.model import Llama

ROW_MULTIPLE = 16
"""Matrices have a multiple of this many rows: measured with MKL, rounding is the same from 4 (two threads: 12) on."""


@dataclass(eq=False)
class Prompt:
    """A prompt that was run."""

    logits: Tensor  # [V], after the prompt
    keys: Tensor  # [layers, P, H_kv, head_dim]
    values: Tensor


class TorchBatch:
    """Rows 0..active-1 are sequences being decoded.

    Args:
        model: its weights are used as they are.
        slots: most rows.
        max_len: most tokens of a sequence.
        stats: what is counted in.
    """

    def __init__(self, model: Llama, slots: int, max_len: int, stats: EngineStats) -> None:
        self.model, self.stats = model, stats
        self.device = model.lm_head.weight.device
        slots = _padded(slots)  # padding rows write to slots of their own
        self._cache = KVCache(model.config, slots, self.device, model.lm_head.weight.dtype)
        self.rows = Rows(slots, self.device)

    def reload(self, model: Llama) -> None:
        """Takes the weights of a model of the same shape; nothing may be under way."""
        self.model = model

    def prefill(self, requests: Sequence[Request]) -> list[Prompt]:
        """Runs the prompts of requests, packed."""
        lengths = [len(request.prompt_ids) for request in requests]
        n_tokens, ends = sum(lengths), torch.tensor(lengths).cumsum(0)
        # Padding is a last prompt of its own; see the top of this file.
        padding = _padded(n_tokens) - n_tokens
        packed = [*lengths, padding] if padding else lengths
        ids = torch.tensor([t for request in requests for t in request.prompt_ids] + [0] * padding)
        positions = torch.cat([torch.arange(length) for length in packed])
        last = torch.zeros(_padded(len(requests)), dtype=torch.int64)
        last[: len(requests)] = ends - 1
        attend = PromptAttention(packed)
        logits = self.model(*(x.to(self.device) for x in (ids, positions)), attend, rows=last.to(self.device))
        keys, values = attend.keys, attend.values
        self.stats.prompt_tokens += n_tokens
        prompts = []
        for i, (end, length) in enumerate(zip(ends.tolist(), lengths)):
            one = slice(end - length, end)
            prompts.append(Prompt(logits[i], keys[:, one], values[:, one]))
        return prompts

    def start(self, first: int, prompts: Sequence[Prompt], room: list[int]) -> None:
        """Puts a sample of each prompt into rows first, first + 1, ..., with room for so many tokens."""
        self._cache.reserve(max(prompt.keys.shape[1] + n for prompt, n in zip(prompts, room)))
        for row, prompt in enumerate(prompts, first):
            self._cache.fill(row, prompt.keys, prompt.values)

    def emit(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Samples the next token of `rows` [m] from logits [m, V]; bool [m]: the rows that end with it."""
        state = self.rows
        tokens = sample(logits, state.temperature[rows], state.top_p[rows], state.keys[rows], state.steps[rows])
        self.stats.generated_tokens += len(rows)
        return state.append(rows, tokens, logits.float().log_softmax(-1))

    def decode(self, active: int) -> Tensor:
        """A token, or several, for every row until one of them ends; bool [active]: those that do."""
        n, rows = _padded(active), self.rows
        logits = self.model(rows.last_tokens[:n], rows.lengths[:n], self._cache.decode(rows.lengths[:n]))
        rows.lengths[:active] += 1
        return self.emit(torch.arange(active, device=self.device), logits[:active])

    def release(self, row: int) -> None:
        """The sequence of a row is over."""

    def move(self, source: Tensor, target: Tensor) -> None:
        """Moves the sequences of rows `source` to rows `target` (int64 [m] each), whose own are over."""
        self._cache.move(source, target, int(self.rows.lengths[source].max()))
        self.rows.move(source, target)


def _padded(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
