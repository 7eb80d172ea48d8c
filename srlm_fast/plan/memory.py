"""What every GPU holds in each phase, and what to change until it fits.

Bytes of weights, gradients and moments are exact. Those of activations follow from what the operators of
`srlm_fast.model` keep for the backward pass; lengths are the longest that the configuration allows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch

from srlm_fast.config import Config, longest_response, lookup
from srlm_fast.errors import UserError
from srlm_fast.kernels.linear_softmax import CHUNK_BYTES
from srlm_fast.kernels.linear_softmax import plan as head_plan
from srlm_fast.lora import add_adapters, check_options, is_adapter
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.parallel import compute_dtype, mesh_shape
from srlm_fast.plan.machine import Assumptions, Machine

GIB = 2**30
CUDA = torch.device("cuda")

MOMENT_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2 + 2 * 4 / 256}
"""Of both moments, per parameter; with 8 bits a scale for 256 values."""

Parts = dict[str, float]
"""Bytes by what they are for."""


class Plan:
    """A configuration on a machine.

    Args:
        config: all keys.
        shape: of the model.
        machine: the GPUs, one process each.
        assumptions: see there.

    Raises:
        UserError: when parallel.* or engine.tensor_parallel does not fit the machine.
    """

    def __init__(
        self, config: Config, shape: LlamaConfig, machine: Machine, assumptions: Assumptions | None = None
    ) -> None:
        check_options(config.lora)
        if config.parallel.backend != "fsdp2":
            raise UserError(f"parallel.backend={config.parallel.backend}: only fsdp2 is planned; leave it out")
        self.config, self.shape, self.machine = config, shape, machine
        self.assumptions = assumptions or Assumptions()
        self.replicate, self.shard = mesh_shape(machine.n_gpus, config.parallel)
        self.dtype = compute_dtype(CUDA, config.parallel)
        tensor_parallel, local = config.engine.tensor_parallel, min(machine.n_gpus, machine.per_node)
        if local % tensor_parallel or shape.num_attention_heads % tensor_parallel:
            raise UserError(
                f"engine.tensor_parallel={tensor_parallel} divides {local} GPUs of a node and "
                f"{shape.num_attention_heads} heads, or it does not serve"
            )

    # --------------------------------------------------------------------------------------------------------- numbers

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shapes of the parameters, adapters among them, and how many there are of each: blocks are alike."""
        with torch.device("meta"):
            model = add_adapters(Llama(replace(self.shape, num_hidden_layers=1)), self.config.lora)
            parameters = dict(model.named_parameters())
        layers = self.shape.num_hidden_layers
        return {name: (tuple(p.shape), layers if _in_block(name) else 1) for name, p in parameters.items()}

    @cached_property
    def n_block(self) -> int:
        """Parameters of one block, without adapters."""
        in_block = ((name, shape) for name, (shape, _) in self.tensors.items() if _in_block(name))
        return sum(math.prod(shape) for name, shape in in_block if not is_adapter(name))

    @cached_property
    def n_adapters(self) -> int:
        """Parameters of the adapters of one block."""
        return sum(math.prod(shape) for name, (shape, _) in self.tensors.items() if is_adapter(name))

    @cached_property
    def n_root(self) -> int:
        """Parameters outside of the blocks: embedding, head, final norm."""
        return sum(math.prod(shape) for name, (shape, _) in self.tensors.items() if not _in_block(name))

    @property
    def n_parameters(self) -> int:
        """Parameters of the model, without adapters."""
        return self.n_root + self.shape.num_hidden_layers * self.n_block

    @property
    def n_trained(self) -> int:
        """Parameters that have gradients and moments: the adapters where there are some, else all."""
        return self.shape.num_hidden_layers * self.n_adapters or self.n_parameters

    def local_parameters(self, rank: int = 0, *, trained: bool = False) -> int:
        """Parameters in the shard of a rank of a copy, adapters among them, or the trained ones of them.

        FSDP2 gives each rank ceil(rows / ranks) rows of every tensor.
        """
        total = 0
        for name, ((rows, *rest), count) in self.tensors.items():
            if trained and self.n_adapters and not is_adapter(name):
                continue
            most = math.ceil(rows / self.shard)
            total += count * min(max(rows - rank * most, 0), most) * math.prod(rest)
        return total

    def parameter_bytes(self, rank: int = 0) -> int:
        """Bytes of that shard: fp32 what is trained, in the dtype of the computation what is frozen."""
        trained = self.local_parameters(rank, trained=True)
        return 4 * trained + self.itemsize * (self.local_parameters(rank) - trained)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    def longest(self, section: str) -> int:
        """Most tokens of an item."""
        response = longest_response(self.config)[0] if section == "dpo" else 0
        return self.config.model.max_seq_len + response

    def microbatch(self, section: str) -> tuple[int, int]:
        """Tokens of the largest micro-batch, and micro-batches of a step, when all items are as long as allowed."""
        options = lookup(self.config, section)
        items = math.ceil(options.batch_size / self.machine.n_gpus)
        fit = max(1, options.tokens_per_microbatch // self.longest(section))
        return min(items, fit) * self.longest(section), math.ceil(items / fit)

    # ---------------------------------------------------------------------------------------------------------- memory

    def kept_per_token(self, policy: str, keys_per_token: float = 1.0) -> float:
        """Bytes that a block keeps for its backward pass, per token.

        Args:
            policy: parallel.checkpointing.
            keys_per_token: keys per token where attention is given a gathered copy of them (all but the CPU's).
        """
        shape = self.shape
        width, inner = shape.hidden_size, shape.intermediate_size
        q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        if policy == "full":
            return width * self.itemsize
        softmax = 4 * shape.num_attention_heads  # log-sum-exp, fp32
        if policy == "selective":  # input, v, attention, o
            return (2 * width + q + kv) * self.itemsize + softmax
        norms = 4 * width * self.itemsize + 2 * 4  # sums and results of two norms, reciprocal roots
        attention = (2 * q + 2 * kv * keys_per_token) * self.itemsize + softmax
        dropped = 2 * width if self.config.model.dropout else 0  # masks
        return norms + attention + 3 * inner * self.itemsize + dropped + self._kept_of_adapters()

    def _kept_of_adapters(self) -> float:
        """Bytes that the adapters of a block keep per token: what is between A and B, and with dropout what A sees."""
        lora = self.config.lora
        thin = [shape for name, (shape, _) in self.tensors.items() if ".lora_A." in name]
        seen = sum(width for _, width in thin) * (self.itemsize + 1) if lora.dropout else 0  # with a mask
        return sum(rank for rank, _ in thin) * self.itemsize + seen

    def activations(self, section: str) -> tuple[float, float]:
        """Bytes that all blocks keep of a micro-batch, and that one block needs beside them while its gradients are
        made: what it computes again, and the gradients of it."""
        tokens, _ = self.microbatch(section)
        policy, shape = self.config.parallel.checkpointing, self.shape
        longest, responses = self.longest(section), 2 if section == "dpo" else 1
        answer = min(longest_response(self.config)[0], longest // 2)
        keys = 1 + responses * (longest - responses * answer) / longest  # every response has those of the prompt
        gradients = (3 * shape.intermediate_size + 2 * shape.hidden_size) * self.itemsize
        again = 0.0 if policy == "none" else self.kept_per_token("none", keys)
        return tokens * shape.num_hidden_layers * self.kept_per_token(policy, keys), tokens * (again + gradients)

    def head(self, section: str) -> float:
        """Bytes of the log-prob head: unit gradients, logits of a chunk, the fp32 sum of the weight's gradient."""
        tokens, _ = self.microbatch(section)
        rows, n_cols = min(tokens, tokens if section == "sft" else self._targets()), self.shape.vocab_size
        keep, forward_rows, backward_rows = head_plan(rows, n_cols, self.dtype, CHUNK_BYTES)
        logits = min(rows, forward_rows) * n_cols * 4
        unit = rows * n_cols * self.itemsize if keep else min(rows, backward_rows) * n_cols * (4 + self.itemsize)
        return logits + unit + (0 if self.n_adapters else 4 * n_cols * self.shape.hidden_size)

    def _targets(self) -> int:
        """Most predicted tokens of a micro-batch of pairs."""
        tokens, _ = self.microbatch("dpo")
        return tokens // self.longest("dpo") * 2 * longest_response(self.config)[0]

    def training(self, section: str) -> Parts:
        """Bytes of a GPU that trains by the keys of `section`, at the fullest moment of a step.

        That is in the head, when all activations are kept; in the backward pass of the last block, when most of them
        are; or in that of the first one, when all gradients are there.
        """
        parallel, local = self.config.parallel, self.local_parameters(trained=True)
        layers = self.shape.num_hidden_layers
        _, n_microbatches = self.microbatch(section)
        whole = n_microbatches > 1 and parallel.reduce == "step" and self.machine.n_gpus > 1
        gradients = 4 * (self.n_trained if whole else local)
        earlier = gradients if n_microbatches > 1 else 0
        kept, block = self.activations(section)
        weights, root, wide = self.gathered(2), self.gathered(1), 0.0
        if weights:  # as computed, and in fp32 on their way to other ranks; the head's wait for the embedding's
            wide = (self.itemsize + 4) * (self.n_adapters or self.n_block)
            wide += 0 if self.n_adapters else self.itemsize * self.shape.vocab_size * self.shape.hidden_size
        names = ("gradients", "activations", "one block backward", "head", "gathered weights", "gathered gradients")
        moments = (
            (earlier, kept, 0.0, self.head(section), root, 0.0),
            (max(earlier, gradients / layers), kept, block, 0.0, weights, wide),
            (gradients, kept / layers, block, 0.0, weights, wide),
        )
        fullest = dict(zip(names, max(moments, key=sum), strict=True))
        moments_bytes = MOMENT_BYTES[lookup(self.config, section).moments] * local
        parts = {"parameters": self.parameter_bytes(), "moments": moments_bytes}
        return parts | fullest | {"reserve": self.assumptions.reserve_gib * GIB}

    def gathered(self, n_blocks: int) -> float:
        """Bytes of gathered weights: those outside of the blocks and `n_blocks` blocks, or what parallel.reshard
        leaves there."""
        parallel, n_gpus = self.config.parallel, self.machine.n_gpus
        if n_gpus == 1 and self.itemsize == 4:
            return 0
        block = self.n_block + self.n_adapters
        everything = self.n_root + self.shape.num_hidden_layers * block
        if parallel.reshard == "never":
            return everything * self.itemsize
        within_node = math.gcd(min(n_gpus, self.machine.per_node), self.shard)
        shares = everything / within_node if parallel.reshard == "node" else 0
        return (n_blocks * block + self.n_root + shares) * self.itemsize

    def hand_over(self) -> Parts:
        """Bytes of a GPU while trained weights go to the engine; with engine.name=native, and merged adapters, they go
        by way of a file."""
        if self.config.engine.name == "native" or self.n_adapters:
            return {}
        largest = max(math.prod(shape) for shape, _ in self.tensors.values())
        shares = {"parameters": 4 * self.local_parameters(), "one tensor": 2 * largest * 2}
        return shares | {"engine weights": self.engine_weights, "reserve": self.assumptions.reserve_gib * GIB}

    @property
    def engine_weights(self) -> float:
        """Bytes of the engine's weights on a GPU."""
        engine = self.config.engine
        if engine.name == "native":
            return 4 * self.n_parameters
        return (4 if engine.dtype == "float32" else 2) * self.n_parameters / engine.tensor_parallel

    @property
    def cache_per_token(self) -> float:
        """Bytes of keys and values of a token on a GPU."""
        engine, shape = self.config.engine, self.shape
        itemsize = 4 if engine.name == "native" or engine.dtype == "float32" else 2
        heads = max(1, shape.num_key_value_heads / engine.tensor_parallel)
        return 2 * shape.num_hidden_layers * heads * shape.head_dim * itemsize

    def generating(self) -> Parts:
        """Bytes of a GPU while the engine writes; the trainer holds nothing then."""
        engine = self.config.engine
        cache = engine.kv_cache_gib * GIB
        if engine.name == "native":
            cache = engine.max_batch * self.config.model.max_seq_len * self.cache_per_token
        extra = {"engine": self.assumptions.engine_gib * GIB, "reserve": self.assumptions.reserve_gib * GIB}
        return {"engine weights": self.engine_weights, "keys and values": cache} | extra

    def memory(self) -> dict[str, Parts]:
        """Bytes of a GPU by phase and part."""
        phases = {"sft": self.training("sft"), "dpo": self.training("dpo"), "hand-over": self.hand_over()}
        return {name: parts for name, parts in (phases | {"generating": self.generating()}).items() if parts}

    @property
    def room(self) -> float:
        """Bytes left in the fullest phase; negative when it does not fit."""
        return self.machine.gpu.memory_gib * GIB - max(sum(parts.values()) for parts in self.memory().values())

    # ---------------------------------------------------------------------------------------------------------- levers

    def with_keys(self, changes: dict[str, object]) -> Plan:
        """The plan of a changed configuration."""
        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            section, _, last = name.rpartition(".")
            setattr(lookup(config, section), last, value)
        return Plan(config, self.shape, self.machine, self.assumptions)

    def _candidates(self) -> Iterator[dict[str, object]]:
        """What may be changed to need less, from what costs nothing to what costs most."""
        config, parallel = self.config, self.config.parallel
        local = min(self.machine.n_gpus, self.machine.per_node)
        yield {"parallel.dtype": "bfloat16"}
        if parallel.replicate > 1:
            yield {"parallel.replicate": 1, "parallel.shard": None}
        yield {"parallel.reshard": "always"}
        yield {"parallel.reduce": "microbatch"}
        for name in ("sft", "dpo"):
            yield {f"{name}.tokens_per_microbatch": self.longest(name)}
        if parallel.checkpointing == "none":
            yield {"parallel.checkpointing": "selective"}
        yield {"parallel.checkpointing": "full"}
        yield {"sft.moments": "bf16", "dpo.moments": "bf16"}
        yield {"sft.moments": "8bit", "dpo.moments": "8bit"}
        yield {"engine.name": "vllm"}
        for degree in (2, 4, 8):
            if degree > config.engine.tensor_parallel and local % degree == 0:
                yield {"engine.tensor_parallel": degree}
        yield {"engine.kv_cache_gib": config.engine.kv_cache_gib / 2}

    def levers(self) -> tuple[list[dict[str, object]], Plan]:
        """The changes of keys that make it fit, none of them dispensable, or as much as they do; the plan with them."""
        taken: list[dict[str, object]] = []
        plan = self
        for changes in self._candidates():
            if plan.room >= 0:
                break
            changed = plan.with_keys(changes)
            if _overflow(changed) < _overflow(plan):
                taken, plan = [*taken, changes], changed
        for changes in list(taken):
            others = [other for other in taken if other is not changes]
            without = self.with_keys({name: value for other in others for name, value in other.items()})
            if _overflow(without) <= _overflow(plan):
                taken, plan = others, without
        return taken, plan


def _in_block(name: str) -> bool:
    return name.startswith("model.layers.")


def _overflow(plan: Plan) -> float:
    """Bytes that do not fit, over all phases."""
    limit = plan.machine.gpu.memory_gib * GIB
    return sum(max(0.0, sum(parts.values()) - limit) for parts in plan.memory().values())
