"""The running batch on a CPU in fp32: weights packed once, a paged cache, and whole steps in C++ (csrc/decoder.cpp).

Prompts that begin alike share the blocks of their common beginning, so a judge's rubric is computed once, and the
samples of a request share their whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srlm_fast import native_ops
from srlm_fast.engine.base import EngineStats, Request
from srlm_fast.engine.blocks import BLOCK_TOKENS, BlockPool, table
from srlm_fast.engine.rows import Rows
from srlm_fast.kernels import library
from srlm_fast.kernels.rotary import rotary_table
from srlm_fast.model import Llama

MOST_STEPS = 64
"""Steps in one call: signals are seen between two calls."""


def runs(model: Llama) -> bool:
    """Whether this batch can run a model: fp32 on a CPU, whose operators were built and are to be used."""
    weight = model.lm_head.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and model.config.head_dim % 16 == 0
        and library.fused()
        and native_ops.native_available()
    )


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache, until its last sample has begun."""

    blocks: list[int]
    length: int
    logits: Tensor  # [V]
    waiting: int  # samples that have not begun


class PackedBatch:
    """Rows 0..active-1 of sequences being decoded; see `TorchBatch` for the methods, which are the same."""

    def __init__(self, model: Llama, slots: int, max_len: int, stats: EngineStats) -> None:
        config = model.config
        self.stats = stats
        self.rows = Rows(slots, torch.device("cpu"))
        self._pool = BlockPool(config.num_hidden_layers, config.num_key_value_heads, 2, BLOCK_TOKENS * config.head_dim)
        self._tables = torch.zeros(slots, -(-max_len // BLOCK_TOKENS), dtype=torch.int64)
        self._blocks: list[list[int]] = [[] for _ in range(slots)]
        self.reload(model)

    @torch.inference_mode()
    def reload(self, model: Llama) -> None:
        """Takes the weights of a model of the same shape; nothing may be under way."""
        config, pack = model.config, torch.ops.srlm.pack_panels
        weights = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            weights += [
                block.input_layernorm.weight,
                pack(qkv),
                pack(attention.o_proj.weight),
                block.post_attention_layernorm.weight,
                pack(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
                pack(mlp.down_proj.weight),
            ]
        positions = torch.arange(self._tables.shape[1] * BLOCK_TOKENS)
        weights += [model.model.embed_tokens.weight, model.model.norm.weight, pack(model.lm_head.weight)]
        weights += rotary_table(positions, model.inv_freq.float())
        self._weights = [weight.detach().contiguous() for weight in weights]
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._model = self._weights, [config.hidden_size, config.intermediate_size, *heads], config.rms_norm_eps
        self._pool.forget()

    def prefill(self, requests: Sequence[Request]) -> list[Prompt]:
        """See `TorchBatch.prefill`."""
        found = [self._pool.prompt(request.prompt_ids) for request in requests]
        ids, owner, positions, last = [], [], [], []
        for i, (request, (_, held)) in enumerate(zip(requests, found)):
            ids += request.prompt_ids[held:]
            positions += range(held, len(request.prompt_ids))
            owner += [i] * (len(request.prompt_ids) - held)
            last.append(len(ids) - 1)
            self.stats.cached_tokens += held
        self.stats.prompt_tokens += len(ids)
        width = max(len(blocks) for blocks, _ in found)
        tables = torch.stack([table(blocks, width) for blocks, _ in found])
        packed = (torch.tensor(x) for x in (ids, owner, positions, last))
        logits = torch.ops.srlm.decoder_logits(*self._model, self._pool.cache, tables, *packed)
        return [
            Prompt(blocks, len(request.prompt_ids), row, request.n)
            for request, (blocks, _), row in zip(requests, found, logits)
        ]

    def start(self, first: int, prompts: Sequence[Prompt], room: list[int]) -> None:
        """See `TorchBatch.start`."""
        for row, (prompt, n) in enumerate(zip(prompts, room), first):
            prompt.waiting -= 1
            whole = prompt.length // BLOCK_TOKENS
            blocks = [self._pool.share(block) for block in prompt.blocks[:whole]]
            blocks += [self._pool.copy(block) for block in prompt.blocks[whole:]]
            if not prompt.waiting:
                self._pool.release(prompt.blocks)
            while len(blocks) * BLOCK_TOKENS < prompt.length + n:
                blocks.append(self._pool.take())
            self._blocks[row] = blocks
            self._tables[row, : len(blocks)] = torch.tensor(blocks)

    def emit(self, rows: Tensor, logits: Tensor) -> Tensor:
        """See `TorchBatch.emit`."""
        self.stats.generated_tokens += len(rows)
        return torch.ops.srlm.decoder_emit(logits, rows, self._state())

    def decode(self, active: int) -> Tensor:
        """See `TorchBatch.decode`."""
        ended, steps = torch.ops.srlm.decoder_generate(
            *self._model, self._pool.cache, self._tables, self._state(), active, MOST_STEPS
        )
        self.stats.generated_tokens += active * steps
        return ended

    def release(self, row: int) -> None:
        """See `TorchBatch.release`."""
        self._pool.release(self._blocks[row])
        self._blocks[row] = []

    def move(self, source: Tensor, target: Tensor) -> None:
        """See `TorchBatch.move`."""
        self.rows.move(source, target)
        self._tables[target] = self._tables[source]
        for a, b in zip(source.tolist(), target.tolist()):
            self._blocks[b], self._blocks[a] = self._blocks[a], []

    def _state(self) -> list[Tensor]:
        r = self.rows
        one = [r.last_tokens, r.lengths, r.steps, r.room, r.keys, r.temperature, r.top_p, r.stop_ids, r.extra_ids]
        return [*one, r.tokens, r.logprobs, r.extra_logprobs]
