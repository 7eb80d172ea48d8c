"""Weights on their way into vLLM: whole tensors by name, counted, and a probe that shows that they have arrived.

vLLM itself says nothing when a tensor is missing: the old value stays. So names and shapes are compared with the
model's own list, and what is served is compared with what was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srlm_fast.engine.kv_cache import PromptAttention
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.seeds import derive_seed

Shapes = Mapping[str, tuple[int, ...]]

PROBE_TOKENS = 32
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest mean difference of the probe's log-probs, in nats, by the dtype of the products. Rounding gave 1e-5 in
float32 and 0.03 to 0.05 in bfloat16 (2 and 4 layers, trainer in float32), a head that was not replaced 14."""


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors of a model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}


def check_names(found: Shapes, expected: Shapes) -> None:
    """Refuses a set of tensors that is not the model's.

    Raises:
        UserError: with the names that are missing, unknown or of another shape.
    """
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(n for n in found.keys() & expected.keys() if found[n] != expected[n]),
    }
    parts = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if parts:
        raise UserError(f"vllm engine: these weights are not those of its model; {'; '.join(parts)}")


def counted(tensors: Iterable[tuple[str, Tensor]], expected: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Hands tensors on, each once and all of them.

    Raises:
        UserError: at a name that is unknown or came before, at a wrong shape, and at the end if some did not come.
    """
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"vllm engine: tensor {name} was sent twice")
        if name not in expected or tuple(tensor.shape) != expected[name]:
            check_names({**expected, name: tuple(tensor.shape)}, expected)
        seen.add(name)
        yield name, tensor
    check_names({name: expected[name] for name in seen}, expected)


def untied(tensors: Iterable[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Adds the output head of a model that shares it with the embedding.

    vLLM is told that it does not: when it reloads tied weights on a CPU the head keeps its old values (0.32).
    """
    for name, tensor in tensors:
        yield name, tensor
        if config.tie_word_embeddings and name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor


@dataclass(frozen=True)
class Probe:
    """What the trainer's weights say of some tokens.

    ids: what all models of a vocabulary are probed with. logprobs: of ids[1:]. dtype: in which the trainer computes.
    """

    ids: list[int]
    logprobs: list[float]
    dtype: torch.dtype

    def check(self, served: list[float], dtype: torch.dtype) -> None:
        """Refuses to serve weights that do not compute what the trainer's compute.

        Args:
            served: the engine's log-probs of ids[1:].
            dtype: in which the engine computes; of the two the rougher one says what is rounding.

        Raises:
            UserError: with the difference found.
        """
        differences = (torch.tensor(served) - torch.tensor(self.logprobs)).abs()
        mean, largest = differences.mean().item(), differences.max().item()
        tolerance, rougher = max((TOLERANCE[d], str(d)) for d in (dtype, self.dtype))
        if not mean <= tolerance:  # NaN, too
            raise UserError(
                f"vllm engine: log-probs of {len(served)} probe tokens differ from the trainer's by {mean:.3g} nats on "
                f"average ({largest:.3g} at most), more than {tolerance:g} for {rougher}: it does not serve the "
                "weights that were trained; try another version of vllm"
            )


@torch.no_grad()
def take_probe(model: nn.Module, ids: list[int] | None = None) -> Probe:
    """Asks the trainer's model, without dropout. With FSDP2 all ranks call it."""
    ids = ids or [derive_seed("probe", i) % model.config.vocab_size for i in range(PROBE_TOKENS)]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    tokens = torch.tensor(ids, device=device)
    with torch.compiler.set_stance("force_eager"):  # where blocks are compiled, not for one short pass
        logits = model(tokens, torch.arange(len(ids), device=device), PromptAttention([len(ids)]))
    model.train(training)
    logprobs = logits[:-1].float().log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
    return Probe(ids, logprobs.tolist(), logits.dtype)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
