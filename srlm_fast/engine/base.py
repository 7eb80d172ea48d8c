"""What every generation engine understands: requests in, completions out as they finish."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from srlm_fast.errors import UserError


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it."""

    prompt_ids: Sequence[int]  # bos included, if the chat format wants one
    n: int = 1  # completions wanted; sample i of a request is the same whatever n is
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # sample from the most probable tokens that together have at least this probability
    max_new_tokens: int = 256  # fewer where the context of the model ends
    seed: int = 0  # with the index of the sample and the step, all that sampling depends on
    stop_ids: Sequence[int] = ()  # a completion ends with the first of these tokens
    logprob_token_ids: Sequence[int] = ()  # log-probabilities wanted at every step, sampled or not
    metadata: Any = None  # the caller's own, handed back in the completion


@dataclass(frozen=True)
class Completion:
    """Sample `index` of a request. Log-probabilities are natural and raw: before temperature and top-p."""

    request: Request
    index: int
    token_ids: list[int]  # a stop token is included, as the last one
    logprobs: list[float]  # of token_ids
    finish_reason: Literal["stop", "length"]
    extra_logprobs: list[list[float]] = field(default_factory=list)  # per step, of request.logprob_token_ids


@dataclass
class EngineStats:
    """Work done since the engine was made. Time that the caller spends between two completions is not counted."""

    prompt_tokens: int = 0  # tokens run through prefill; the n samples of a request share one
    cached_tokens: int = 0  # prompt tokens whose keys and values were there already, from prompts that begin alike
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, prefill time included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class Engine(Protocol):
    """A generation engine; made by `load_engine`, it holds no weights until `load`."""

    stats: EngineStats
    max_batch: int  # sequences decoded at the same time

    def load(self, weights: str | Path) -> None:
        """Reads the weights of a Hugging Face folder, in place of those it had; drops all requests under way."""

    def push(self, model: nn.Module, folder: str | Path) -> bool:
        """Takes weights over from a model in memory, whole or sharded, that `folder` holds too.

        False: it has not, and `load(folder)` is to be called. All ranks call this.
        """

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests, also while `stream` is being iterated. UserError names the first that is unfit."""

    def stream(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Submits `requests`, then yields completions as they finish, until none is left."""

    def sleep(self) -> None:
        """Gives back the memory of weights and caches for training, drops all requests; `load` or `push` wakes it."""

    def close(self) -> None:
        """Gives back everything; the engine is of no use afterwards."""


def check_request(request: Request, name: str, *, vocab_size: int, max_len: int) -> None:
    """Refuses a request that cannot be served.

    Args:
        request: the request.
        name: what the message calls it.
        vocab_size: token ids are below this.
        max_len: tokens of prompt and completion together that the engine can hold.

    Raises:
        UserError: saying which value of which request is wrong.
    """

    def refuse(what: str) -> None:
        about = "" if request.metadata is None else f" ({str(request.metadata)[:80]})"
        raise UserError(f"{name}{about}: {what}")

    length = len(request.prompt_ids)
    if length == 0:
        refuse("the prompt is empty; it needs one token at least (bos)")
    if length >= max_len:
        refuse(f"the prompt has {length} tokens, which leaves no room to answer in a context of {max_len}; shorten it")
    for kind in ("prompt_ids", "stop_ids", "logprob_token_ids"):
        for token in getattr(request, kind):
            if not 0 <= token < vocab_size:
                refuse(f"{kind} holds token id {token}, outside the model's vocabulary 0..{vocab_size - 1}")
    if request.n < 1 or request.max_new_tokens < 1:
        refuse(f"n={request.n} and max_new_tokens={request.max_new_tokens} must be 1 or more")
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        refuse(f"temperature={request.temperature} must be 0 (greedy) or a positive number")
    if not 0 < request.top_p <= 1:
        refuse(f"top_p={request.top_p} must be over 0 and at most 1")
