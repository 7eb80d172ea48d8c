"""Judgements by another model, behind any server that speaks OpenAI's chat completions.

The server is asked from a few threads while the engine goes on answering. The client tries a request again when the
server is busy or fails, waiting longer each time; what it cannot do is one error, which ends the phase. Finished
prompts are kept (srlm_fast.shards), so the same command goes on from there. Unlike those of the engine, judgements of a
server are not the same when asked for again.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from srlm_fast.config import JudgeConfig
from srlm_fast.engine.base import Completion, Engine
from srlm_fast.errors import UserError
from srlm_fast.judge import Judgement, expected_digit, find_score, judge_prompt, load_template, mean_score
from srlm_fast.rollout import Judged, Reply
from srlm_fast.seeds import derive_seed

TOP_LOGPROBS = 20
"""Tokens whose log-probabilities are asked for with judge.mode=expected: the most that OpenAI and vLLM give."""
_TOO_LONG = ("context_length_exceeded", "maximum context length", "context window")


class Endpoint:
    """The server of judge.endpoint, asked with judge.endpoint_* as they are configured.

    Raises:
        UserError: when the `openai` package is missing, judge.endpoint is no address, or judge.endpoint_model is unset.
    """

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("judge.endpoint needs the openai package: pip install 'srlm-fast[judge]'") from None
        if not str(config.endpoint).startswith(("http://", "https://")):
            raise UserError(
                f"judge.endpoint={config.endpoint!r} is no address; give the base URL, such as http://host:8000/v1"
            )
        if not config.endpoint_model:
            raise UserError("judge.endpoint_model is empty; name the model that the server of judge.endpoint shall run")
        self.config = config
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=config.endpoint,
            api_key=os.environ.get(config.endpoint_key) or "none",  # a server of one's own may want no key
            max_retries=config.endpoint_retries,
            timeout=config.endpoint_timeout,
        )

    def ask(
        self, prompt: str, seed: int, *, n: int = 1, temperature: float | None = None, logprobs: bool = False
    ) -> list[Any] | None:
        """At least one choice, some servers not giving all n; None when the prompt is too long for the model.

        Args:
            prompt: one message of a user.
            seed: sent along; not all servers heed it.
            n: choices wanted.
            temperature: None: judge.temperature.
            logprobs: whether the likeliest tokens of every step are asked for.

        Raises:
            UserError: when the server cannot be reached, refuses, or keeps failing.
        """
        config, openai = self.config, self._openai
        options: dict[str, Any] = {"n": n} if n > 1 else {}
        if logprobs:
            options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            answer = self._client.chat.completions.create(
                model=config.endpoint_model,
                messages=[{"role": "user", "content": prompt}],
                temperature=config.temperature if temperature is None else temperature,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens,
                seed=seed,
                **options,
            )
        except openai.APIStatusError as error:
            if error.status_code == 400 and any(sign in str(error) for sign in _TOO_LONG):
                return None
            raise UserError(self._refusal(error)) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise UserError(
                f"judge.endpoint={config.endpoint} cannot be reached ({cause}); tried {config.endpoint_retries + 1} "
                "times. Start the server or mend the address; the same command goes on from here"
            ) from None
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"judge.endpoint={config.endpoint} gave an answer that cannot be read: {error}") from None
        choices = getattr(answer, "choices", None)
        if not choices:
            raise UserError(
                f"judge.endpoint={config.endpoint} does not answer like an OpenAI server ({str(answer)[:80]!r}); give "
                "the base URL, which mostly ends in /v1"
            )
        return list(choices)

    def _refusal(self, error: Any) -> str:
        config, status = self.config, error.status_code
        what = f"judge.endpoint={config.endpoint} answered {status}: {str(error.message)[:200]}"
        if status in (401, 403):
            return f"{what}. The key is taken from the environment variable {config.endpoint_key} (judge.endpoint_key)"
        if status == 404:
            return f"{what}. Check the address (mostly it ends in /v1) and judge.endpoint_model={config.endpoint_model}"
        if status in (408, 409, 429) or status >= 500:
            return f"{what}. Tried {config.endpoint_retries + 1} times; the same command goes on from here"
        return what


class EndpointJudge:
    """The judge of judge.endpoint; takes the place of `srlm_fast.rollout.Judge`.

    Raises:
        UserError: as `Endpoint` does.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._endpoint = Endpoint(config)
        self.config, self.n = config, config.n
        self.template = load_template(config.template)

    def judging(self, engine: Engine, schedule: str = "streamed") -> _Asking:
        """Judgements by the server; `schedule` is of no concern to it."""
        return _Asking(self.judge, self.config.endpoint_concurrency)

    def score(self, judgements: Iterable[Judgement]) -> float | None:
        """See `Judge.score`."""
        return mean_score(judgements, self.config.mode, self.config.min_valid)

    def judge(self, reply: Reply, seed: int) -> list[Judgement]:
        """n judgements of a reply; none when it is too long for the server's model.

        Raises:
            UserError: when the server cannot be reached, refuses, or keeps failing.
        """
        prompt = judge_prompt(reply.instruction, reply.text, self.template)
        judgements: list[Judgement] = []
        while len(judgements) < self.n:
            asked = derive_seed(seed, len(judgements)) if judgements else seed
            choices = self._endpoint.ask(
                prompt, asked, n=self.n - len(judgements), logprobs=self.config.mode == "expected"
            )
            if choices is None:
                return []
            judgements += [self._read(choice, asked) for choice in choices]
        return judgements[: self.n]

    def _read(self, choice: Any, seed: int) -> Judgement:
        config, text = self.config, choice.message.content or ""
        found = find_score(text, decimals=config.decimals, max_score=config.max_score, which=config.which)
        score, expected = (None, None) if found is None else (found[0], self._expected(choice, text, found[1]))
        return Judgement(text, score, seed, "length" if choice.finish_reason == "length" else "stop", expected)

    def _expected(self, choice: Any, text: str, place: int) -> float | None:
        """Mean of the digit at `place`, of those digits that are among the likeliest tokens there."""
        tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
        end = 0
        for token in tokens:
            if not text.startswith(token.token, end):
                return None  # the tokens do not spell the text
            end += len(token.token)
            if end > place:
                found = {top.token.strip(): top.logprob for top in token.top_logprobs}
                digits = range(int(self.config.max_score) + 1)
                return expected_digit(found.get(str(digit), -math.inf) for digit in digits)
        return None


class EndpointWriter:
    """Texts by the model of judge.endpoint, to prompts of any kind.

    Raises:
        UserError: as `Endpoint` does.
    """

    speaker = None  # no model of the engine

    def __init__(self, config: JudgeConfig, *, temperature: float) -> None:
        self._endpoint, self._temperature = Endpoint(config), temperature

    def write_each(self, prompts: Iterable[tuple[Any, str, int]]) -> Iterator[tuple[Any, str | None]]:
        """(key, text) of (key, prompt, seed), as they finish; None for a prompt that is too long."""
        asking = _Asking(self._write, self._endpoint.config.endpoint_concurrency)
        for key, prompt, seed in prompts:
            asking.submit(prompt, seed, key)
        while asking.more():
            yield from asking.ready()

    def _write(self, prompt: str, seed: int) -> str | None:
        choices = self._endpoint.ask(prompt, seed, temperature=self._temperature)
        return None if choices is None else choices[0].message.content or ""


class _Asking:
    """What to ask, and what came of it, through threads that end when all is done or one of them fails.

    Args:
        ask: (question, seed) -> answer; for a judge (reply, seed) -> its judgements.
        concurrency: most threads.
    """

    def __init__(self, ask: Callable[[Any, int], Any], concurrency: int) -> None:
        self._ask, self._concurrency = ask, concurrency
        self._todo: queue.SimpleQueue[tuple[Any, int, Any] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Any, Any] | BaseException] = queue.SimpleQueue()
        self._next: list[tuple[Any, Any] | BaseException] = []  # taken out of `_done` by `more`
        self._waiting = self._threads = 0
        self._failed = False

    def submit(self, question: Any, seed: int, key: Any) -> bool:
        self._waiting += 1
        self._todo.put((question, seed, key))
        if self._threads < min(self._waiting, self._concurrency):
            self._threads += 1
            threading.Thread(target=self._work, name="judge.endpoint", daemon=True).start()
        return True

    def take(self, completion: Completion) -> Iterable[Judged]:
        raise AssertionError("the engine was asked for answers only")

    def ready(self) -> Iterator[tuple[Any, Any]]:
        while self._next or not self._done.empty():
            result = self._next.pop() if self._next else self._done.get()
            if isinstance(result, BaseException):
                self._end()
                raise result
            self._waiting -= 1
            yield result

    def more(self) -> bool:
        if not self._waiting:
            self._end()
            return False
        self._next.append(self._done.get())
        return True

    def _end(self) -> None:
        for _ in range(self._threads):
            self._todo.put(None)
        self._threads = 0

    def _work(self) -> None:
        while (asked := self._todo.get()) is not None and not self._failed:
            question, seed, key = asked
            try:
                self._done.put((key, self._ask(question, seed)))
            except BaseException as error:
                self._failed = True
                self._done.put(error)
