"""Llama from scratch: RMSNorm, rotary embedding (rotate-half), grouped-query attention, SwiGLU.

Parameter names and layouts are those of Hugging Face's LlamaForCausalLM, so checkpoints need no conversion. The model
sees packed tokens [T] and is given its attention as a function: the trainer passes packed segments, the engine its
key/value cache. It knows nothing of parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlm_fast.errors import UserError
from srlm_fast.kernels.embedding import embedding
from srlm_fast.kernels.linear import linear
from srlm_fast.kernels.linear_logprob import linear_logprob, log_collisions
from srlm_fast.kernels.rms_norm import add_rms_norm, rms_norm
from srlm_fast.kernels.rotary import rotary, rotary_table
from srlm_fast.kernels.swiglu import swiglu

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q [T, H, hd], k [T, H_kv, hd], v [T, H_kv, hd]) -> [T, H, hd]; q and k are already rotated."""


def _rope_type(rope_scaling: dict[str, Any] | None) -> str:
    scaling = rope_scaling or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama, with the field names of a Hugging Face config.json."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config.json: head_dim={self.head_dim} is odd, rotary embedding needs an even one")
        rope_type = _rope_type(self.rope_scaling)
        if rope_type not in ("default", "linear", "llama3"):
            raise UserError(
                f"config.json: rope_scaling type {rope_type!r} is not supported (default, linear, llama3 are)"
            )

    @classmethod
    def named(cls, name: str) -> LlamaConfig:
        """A published size: one of `NAMED_CONFIGS`."""
        if name not in NAMED_CONFIGS:
            raise UserError(f"unknown model size {name!r}; known: {', '.join(NAMED_CONFIGS)}")
        return NAMED_CONFIGS[name]

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlamaConfig:
        """From the content of a Hugging Face config.json.

        Raises:
            UserError: when it is no LlamaForCausalLM, lacks a size, or asks for something this model has not (bias).
        """
        if hf.get("model_type") != "llama":
            raise UserError(f"config.json: model_type is {hf.get('model_type')!r}, only 'llama' is supported")
        for key in ("attention_bias", "mlp_bias"):
            if hf.get(key):
                raise UserError(f"config.json: {key}=true is not supported, Llama has no biases")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json: hidden_act={hf['hidden_act']!r} is not supported, Llama uses 'silu'")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in required:
            if not isinstance(hf.get(key), int) or hf[key] < 1:
                raise UserError(f"config.json: {key} must be a positive integer, got {hf.get(key)!r}")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in hf.items() if k in known and v is not None}
        rope = hf.get("rope_parameters") or {}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        if _rope_type(rope) != "default":
            values["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        values.setdefault("num_key_value_heads", hf["num_attention_heads"])
        values.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
        for key in ("bos_token_id", "eos_token_id"):
            values[key] = tuple(hf[key]) if isinstance(hf.get(key), list) else hf.get(key)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that Hugging Face and vLLM read as LlamaForCausalLM."""
        hf = asdict(self)
        if isinstance(self.eos_token_id, tuple):
            hf["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
            **hf,
        }


NAMED_CONFIGS: dict[str, LlamaConfig] = {
    "llama2-7b": LlamaConfig(),
    "llama2-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama2-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
}
NAMED_CONFIGS["llama3.1-8b"] = replace(
    NAMED_CONFIGS["llama3-8b"],
    max_position_embeddings=131072,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
NAMED_CONFIGS["llama3.1-70b"] = replace(
    NAMED_CONFIGS["llama3.1-8b"],
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each rotary pair: fp32 [head_dim / 2] on the CPU, with linear or llama3 scaling applied.

    llama3 (Llama 3.1): wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor are kept, and those between are interpolated.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    inv_freq = 1.0 / (config.rope_theta ** (pairs / config.head_dim))
    scaling = config.rope_scaling or {}
    kind = _rope_type(scaling)
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / inv_freq
        keep = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq
    return inv_freq


def main_grad(weight: nn.Parameter) -> Tensor | None:
    """What the operator that makes a matrix's gradient adds it to, so that no other tensor is made for it.

    That is `weight.grad` if whoever trains the model has set `weight.adds_in_place`: hooks on the gradient then see
    nothing. Under torch.compile autograd adds it.
    """
    in_place = getattr(weight, "adds_in_place", False) and torch.is_grad_enabled()
    if not in_place or torch.compiler.is_compiling():
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class RMSNorm(nn.Module):
    """x / rms(x) * weight, after the addition of what the branch before it gave."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x + delta, and its norm; [T, D] each."""
        if delta is None:
            return x, rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, delta, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer without bias, by our own product where that is faster."""

    n_products = 1  # products by `linear` in a forward pass, the one with the weight first

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, main_grad=main_grad(self.weight))


class Embedding(nn.Embedding):
    """nn.Embedding, which on the meta device is not filled: for random numbers there torch loads its compiler."""

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight, main_grad=main_grad(self.weight))

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k = rotary(self.q_proj(x), self.k_proj(x), cos, sin, self.head_dim)
        q, k, v = (projected.view(x.shape[0], -1, self.head_dim) for projected in (q, k, self.v_proj(x)))
        return self.o_proj(attend(self.layer, q, k, v).reshape(x.shape[0], -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = dropout

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the MLP adds to it: the next norm does the addition."""
        x, normalised = self.input_layernorm(x, delta)
        x, normalised = self.post_attention_layernorm(x, self._drop(self.self_attn(normalised, cos, sin, attend)))
        return x, self._drop(self.mlp(normalised))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Decoder(nn.Module):
    """The part that Hugging Face's names call `model`: embedding, blocks, final norm."""

    def __init__(self, config: LlamaConfig, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A decoder-only Llama over packed tokens.

    Args:
        config: the shape.
        dropout: probability on the outputs of attention and MLP before they join the residual stream (the paper's 0.1;
            it does not say where, see docs/paper.md). Active in training mode only.
    """

    def __init__(self, config: LlamaConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, dropout)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", rotary_frequencies(config).to(torch.get_default_device()), persistent=False)

    def reset_buffers(self) -> None:
        """Recompute what is in no checkpoint (the rotary frequencies), as is needed after `to_empty`."""
        self.inv_freq = rotary_frequencies(self.config).to(self.inv_freq.device)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 0.02) for matrices (output projections scaled by 1/sqrt(2 layers)), ones for norms."""
        residual_std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        entropy: bool = False,
        collisions: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits, or the log-probabilities of given targets.

        Args:
            input_ids: int64 [T], packed tokens of any number of sequences.
            positions: int64 [T], position of each token in its own sequence.
            attend: the attention, see `Attend`.
            rows: int64 [N], the tokens whose predictions are wanted; all T of them if None.
            targets: int64 [N], the tokens that `rows` should predict.
            entropy: with `targets`, also give the entropies of the distributions.
            collisions: with `entropy`, also give their `log_collisions`.

        Returns:
            fp32 [N] log-probabilities if `targets` is given, with `entropy` those and the entropies fp32 [N] in nats,
            with `collisions` behind them log sum_v p(v)^2, fp32 [N]; else logits [N, V].
        """
        cos, sin = rotary_table(positions, self.inv_freq.float())
        x, delta = self.model.embed_tokens(input_ids), None
        for block in self.model.layers:
            x, delta = block(x, delta, cos, sin, attend)
        if rows is not None:
            x, delta = x.index_select(0, rows), delta.index_select(0, rows)
        _, x = self.model.norm(x, delta)
        head = self.lm_head.weight
        if collisions:
            logps, entropies = linear_logprob(x, head, targets, return_entropy=True, main_grad=main_grad(head))
            return logps, entropies, log_collisions(x, head, targets, logps)
        if targets is not None:
            return linear_logprob(x, head, targets, return_entropy=entropy, main_grad=main_grad(head))
        return self.lm_head(x)
