"""Answers and judgements through one engine with the same weights.

An answer's judgements are submitted as soon as it is there, behind all answers that wait: both kinds share the running
batch, and the last answers do not run in an empty one. Seeds derive from (seed, prompt id, answer), never from the
order in which things finish, so judging only when all answers are there (`candidates.schedule`) gives the same records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from srlm_fast.chat import ChatFormat
from srlm_fast.config import CandidatesConfig, JudgeConfig
from srlm_fast.data import as_messages
from srlm_fast.engine.base import Completion, Engine, Request
from srlm_fast.errors import UserError
from srlm_fast.judge import Judgement, expected_digit, find_score, judge_prompt, load_template, mean_score
from srlm_fast.seeds import derive_seed


@dataclass(frozen=True)
class Reply:
    """An answer to be judged."""

    id: str
    instruction: str
    text: str


Judged = tuple[Any, list[Judgement]]
"""The key that a reply was submitted with, and all its judgements."""


class Judging(Protocol):
    """Judgements on their way."""

    def submit(self, reply: Reply, seed: int, key: Any) -> bool:
        """Asks for the judgements of a reply; False when it is too long."""

    def take(self, completion: Completion) -> Iterable[Judged]:
        """Takes a completion of the engine that is no answer; yields what that finishes."""

    def ready(self) -> Iterable[Judged]:
        """What was finished elsewhere than in the engine."""

    def more(self) -> bool:
        """Called when the engine has nothing to do: whether there is more to wait for, in it or in `ready`."""


class Scorer(Protocol):
    """Who judges: the model itself (`Judge`), or another one (srlm_fast.endpoint)."""

    def judging(self, engine: Engine, schedule: str) -> Judging:
        """Judgements on their way, beside the answers of an engine."""

    def score(self, judgements: Iterable[Judgement]) -> float | None:
        """What they make of a reply."""


class Judge:
    """Builds judge requests for replies and reads judgements out of their completions.

    The log-probabilities of the score digits are asked for along with a judgement, so that `Judgement.expected` costs
    no second pass. It stays unknown where a tokenizer has no digits of one token each, or the text ends in no score.

    Raises:
        UserError: for a template without its places, or (mode "expected") a tokenizer whose score digits are not one
            token each.
    """

    def __init__(self, chat: ChatFormat, config: JudgeConfig, max_seq_len: int, n: int | None = None) -> None:
        self.chat, self.config, self.max_seq_len = chat, config, max_seq_len
        self.n = n or config.n
        self.template = load_template(config.template)
        self._digits = self._known_digits()
        self._digit_ids = tuple(dict.fromkeys(i for digits in self._digits for i in digits))
        self._reserved = 0
        if config.mode == "expected":
            self._reserved = len(self._score_tokens("")[0]) + 1

    def judging(self, engine: Engine, schedule: str = "streamed") -> Judging:
        """Judgements by the weights of an engine; "sequential" holds the requests back until it has no other work."""
        return _EngineJudging(self, engine, held=schedule == "sequential")

    def score(self, judgements: Iterable[Judgement]) -> float | None:
        """The mean of what judge.mode says decides; None with fewer than judge.min_valid of it."""
        return mean_score(judgements, self.config.mode, self.config.min_valid)

    def prompt(self, reply: Reply) -> str:
        """The judge prompt of a reply, as text."""
        return judge_prompt(reply.instruction, reply.text, self.template)

    def request(self, reply: Reply, seed: int, metadata: Any) -> Request | None:
        """The request for n judgements; None when prompt and judgement do not fit max_seq_len."""
        ids = self.chat.encode_prompt(as_messages(self.prompt(reply)))
        if len(ids) + self.config.max_new_tokens + self._reserved > self.max_seq_len:
            return None
        return Request(
            prompt_ids=ids,
            n=self.n,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            max_new_tokens=self.config.max_new_tokens,
            seed=seed,
            stop_ids=self.chat.stop_ids,
            logprob_token_ids=self._digit_ids,
            metadata=metadata,
        )

    def read(self, completion: Completion) -> Judgement:
        """The judgement of a completion, scored by the number it ends in."""
        text = self.chat.decode(completion.token_ids)
        found = find_score(
            text, decimals=self.config.decimals, max_score=self.config.max_score, which=self.config.which
        )
        score, expected = (None, None) if found is None else (found[0], self._expected(completion, found[1]))
        return Judgement(text, score, completion.request.seed, completion.finish_reason, expected)

    def _expected(self, completion: Completion, place: int) -> float | None:
        """Mean of the digit at `place` of the text, from the log-probabilities of the step that wrote it."""
        for step, token in enumerate(completion.token_ids):
            variant = next((digits for digits in self._digits if token in digits), None)
            if variant is None or not step < len(completion.extra_logprobs):
                continue
            before, after = (len(self.chat.decode(completion.token_ids[:end])) for end in (step, step + 1))
            if before <= place < after:
                logprobs = dict(zip(completion.request.logprob_token_ids, completion.extra_logprobs[step]))
                return expected_digit(logprobs[i] for i in variant)
        return None

    def expected_request(self, completion: Completion, metadata: Any) -> Request:
        """One more token after "Score:", for the distribution over the score digits where a text holds no score.

        A justification that is longer when encoded again than it was when sampled, and then too long, is left out.
        """
        before, mark, text = self.chat.decode(completion.token_ids).rpartition("Score:")
        prefix, digits = self._score_tokens(before if mark else f"{text.rstrip()}\n")
        if len(completion.request.prompt_ids) + len(prefix) >= self.max_seq_len:
            prefix, digits = self._score_tokens("")
        ids = [*completion.request.prompt_ids, *prefix]
        return Request(prompt_ids=ids, max_new_tokens=1, temperature=0.0, logprob_token_ids=digits, metadata=metadata)

    def _score_tokens(self, text: str, mark: str = "Score: ") -> tuple[list[int], tuple[int, ...]]:
        """Ids of `text` and "Score:" up to the score digit, and the ids that the digits 0..max_score have there."""
        coded = [self.chat.encode_text(f"{text}{mark}{digit}") for digit in range(int(self.config.max_score) + 1)]
        prefix, digits = coded[0][:-1], tuple(ids[-1] for ids in coded)
        if any(ids[:-1] != prefix for ids in coded) or len(set(digits)) != len(digits):
            raise UserError(
                "judge.mode=expected needs score digits of one token each, which this tokenizer has not; use cot"
            )
        return prefix, digits

    def _known_digits(self) -> list[tuple[int, ...]]:
        """The ids that the digits 0..max_score have behind a space, and without one where these are others."""
        found = {}
        for mark in ("Score: ", "Score:"):
            try:
                found[self._score_tokens("", mark)[1]] = None
            except UserError:
                continue
        return list(found)


class _EngineJudging:
    """Collects the n judgements of each reply; in mode "expected" one that tells no score is asked for it again."""

    def __init__(self, judge: Judge, engine: Engine, held: bool) -> None:
        self.judge, self.engine = judge, engine
        self._held: list[Request] | None = [] if held else None
        self._done: dict[Any, dict[int, Judgement]] = {}

    def submit(self, reply: Reply, seed: int, key: Any) -> bool:
        request = self.judge.request(reply, seed, ("judge", key))
        if request is None:
            return False
        self._done[key] = {}
        if self._held is None:
            self.engine.submit([request])
        else:
            self._held.append(request)
        return True

    def take(self, completion: Completion) -> Iterable[Judged]:
        kind, key, *rest = completion.request.metadata
        done = self._done[key]
        if kind == "judge":
            judgement = self.judge.read(completion)
            if self.judge.config.mode == "expected" and judgement.expected is None:
                metadata = ("score", key, completion.index, judgement)
                self.engine.submit([self.judge.expected_request(completion, metadata)])
                return
            done[completion.index] = judgement
        else:
            index, judgement = rest
            done[index] = replace(judgement, expected=expected_digit(completion.extra_logprobs[0]))
        if len(done) == self.judge.n:
            del self._done[key]
            yield key, [done[i] for i in range(self.judge.n)]

    def ready(self) -> Iterable[Judged]:
        return ()

    def more(self) -> bool:
        if not self._held:
            return False
        # Answers to the same prompt next to each other: an engine then computes what their prompts share once.
        self.engine.submit(sorted(self._held, key=lambda request: request.metadata[1]))
        self._held = None
        return True


def _results(engine: Engine, judging: Judging | None) -> Iterator[Completion | Judged]:
    """Completions of answers, and judgements, as they finish."""
    while True:
        for completion in engine.stream():
            if completion.request.metadata[0] == "answer":
                yield completion
            else:
                yield from judging.take(completion)
            if judging is not None:
                yield from judging.ready()
        if judging is None or not judging.more():
            return
        yield from judging.ready()


def judge_each(engine: Engine, judge: Judge, replies: Sequence[Reply], seed: int) -> Iterator[Judged]:
    """(reply id, its n judgements) as they finish; a reply too long to be judged has none.

    Replies to the same instruction belong next to each other: an engine then computes what their prompts share once.
    """
    judging = judge.judging(engine)
    for reply in replies:
        if not judging.submit(reply, derive_seed(seed, "judge", reply.id), reply.id):
            yield reply.id, []
    yield from _results(engine, judging)


class _Answers:
    """Prompts under way: their answers, and the judgements of these."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        config: CandidatesConfig,
        seed: int,
        max_seq_len: int,
        judge: Scorer | None,
    ) -> None:
        self.engine, self.chat, self.config, self.seed, self.max_seq_len = engine, chat, config, seed, max_seq_len
        self.judge = judge
        self.judging = judge.judging(engine, config.schedule) if judge else None
        self.unfinished = 0  # answers that are wanted and not there, or not judged
        self._records: dict[str, dict[str, Any]] = {}
        self._candidates: dict[str, dict[int, dict[str, Any]]] = {}  # of a prompt, by index
        self._waiting: dict[str, int] = {}  # unfinished answers of a prompt

    def begin(self, prompts: Sequence[dict[str, str]], n: int) -> Iterator[dict[str, Any]]:
        """Submits prompts; yields the records of those that are too long."""
        for row in prompts:
            key, ids = row["id"], self.chat.encode_prompt(as_messages(row["prompt"]))
            record = {"prompt_id": key, "prompt": row["prompt"], "candidates": [], "prompt_ids": ids}
            if len(ids) + self.config.max_new_tokens > self.max_seq_len:
                yield record
                continue
            self._records[key], self._candidates[key], self._waiting[key] = record, {}, n
            self.unfinished += n
            request = Request(
                prompt_ids=ids,
                n=n,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                max_new_tokens=self.config.max_new_tokens,
                seed=derive_seed(self.seed, "answer", key),
                stop_ids=self.chat.stop_ids,
                metadata=("answer", key),
            )
            self.engine.submit([request])

    def take(self, result: Completion | Judged) -> Iterator[dict[str, Any]]:
        """Takes an answer or the judgements of one; yields the record that this finishes."""
        if isinstance(result, Completion):
            key = result.request.metadata[1]
            candidate = self._candidates[key][result.index] = _candidate(self.chat, result)
            if self.judging is not None and self._ask(self._records[key], candidate):
                return
        else:
            (key, index), judgements = result
            self._candidates[key][index].update(
                judgements=[asdict(j) for j in judgements], score=self.judge.score(judgements)
            )
        self.unfinished -= 1
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            record = self._records.pop(key)
            record["candidates"] = [candidate for _, candidate in sorted(self._candidates.pop(key).items())]
            yield record

    def _ask(self, record: dict[str, Any], candidate: dict[str, Any]) -> bool:
        """Asks for the judgements of a candidate; False, and no score, when it is too long."""
        key, index = record["prompt_id"], candidate["index"]
        reply = Reply(f"{key}/{index}", record["prompt"], candidate["text"])
        asked = self.judging.submit(reply, derive_seed(self.seed, "judge", reply.id), (key, index))
        if not asked:
            candidate.update(judgements=[], score=None)
        return asked


def answer_parts(
    engine: Engine,
    chat: ChatFormat,
    config: CandidatesConfig,
    parts: Iterable[Sequence[dict[str, str]]],
    seed: int,
    max_seq_len: int,
    *,
    judge: Scorer | None = None,
    n: int | None = None,
    overlap: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """n answers to every prompt and, with a judge, their judgements and mean scores; see `answer`.

    Args:
        parts: the prompts in parts. With schedule "streamed" the next one begins before the batch runs empty: when as
            many answers are unfinished as fill half of it, for an unfinished one has two judgements under way or so.
            Else it begins when all is done.
        overlap: False: also with schedule "streamed".
        on_step: called between results, often enough to notice a stop soon.

    Yields:
        One record per prompt, as it is finished.
    """
    coming, overlap = iter(parts), overlap and config.schedule == "streamed"
    while (part := next(coming, None)) is not None:
        answers = _Answers(engine, chat, config, seed, max_seq_len, judge)
        yield from answers.begin(part, n or config.n)
        for result in _results(engine, answers.judging):
            on_step()
            yield from answers.take(result)
            if overlap and answers.unfinished <= engine.max_batch // 2:
                yield from answers.begin(next(coming, ()), n or config.n)


def answer_each(
    engine: Engine,
    chat: ChatFormat,
    config: CandidatesConfig,
    prompts: Sequence[dict[str, str]],
    *arguments: Any,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """`answer_parts` of prompts that are all there."""
    return answer_parts(engine, chat, config, [prompts], *arguments, **options)


def answer(
    engine: Engine,
    chat: ChatFormat,
    config: CandidatesConfig,
    prompts: Sequence[dict[str, str]],
    seed: int,
    max_seq_len: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """The records of `answer_each`, in the order of the prompts.

    Args:
        prompts: rows with "id" and "prompt".

    Returns:
        Per prompt its text and token ids, and "candidates", each with text, token ids, summed raw log-prob, finish
        reason, seed and, if judged, "judgements" and "score" (None: nothing parsable). A prompt too long for an answer
        has no candidates.
    """
    finished = answer_each(engine, chat, config, prompts, seed, max_seq_len, **options)
    records = {record["prompt_id"]: record for record in finished}
    return [records[row["id"]] for row in prompts]


def _candidate(chat: ChatFormat, completion: Completion) -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": chat.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "logprob": sum(completion.logprobs),
        "finish_reason": completion.finish_reason,
        "seed": completion.request.seed,
    }
