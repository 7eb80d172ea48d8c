"""Answers and judgements through one engine with the same weights.

A prompt's judgements are submitted as soon as its answers are there, so both kinds share the running batch. Seeds
derive from (seed, prompt id, answer), never from the order in which things finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from srlm_fast.chat import ChatFormat
from srlm_fast.config import CandidatesConfig, JudgeConfig
from srlm_fast.data import as_messages
from srlm_fast.engine.base import Completion, Engine, Request
from srlm_fast.errors import UserError
from srlm_fast.judge import Judgement, aggregate, judge_prompt, load_template, parse_score
from srlm_fast.seeds import derive_seed


@dataclass(frozen=True)
class Reply:
    """An answer to be judged."""

    id: str
    instruction: str
    text: str


class Judge:
    """Builds judge requests for replies and reads judgements out of their completions.

    Raises:
        UserError: for a template without its places, or (mode "expected") a tokenizer whose score digits are not one
            token each.
    """

    def __init__(self, chat: ChatFormat, config: JudgeConfig, max_seq_len: int, n: int | None = None) -> None:
        self.chat, self.config, self.max_seq_len = chat, config, max_seq_len
        self.n = n or config.n
        self.template = load_template(config.template)
        self._reserved = 0
        if config.mode == "expected":
            self._reserved = len(self._score_tokens("")[0]) + 1

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
            metadata=metadata,
        )

    def read(self, completion: Completion) -> Judgement:
        """The judgement of a completion, scored by the number it ends in."""
        text = self.chat.decode(completion.token_ids)
        score = parse_score(
            text, decimals=self.config.decimals, max_score=self.config.max_score, which=self.config.which
        )
        return Judgement(text, score, completion.request.seed, completion.finish_reason)

    def expected_request(self, completion: Completion, metadata: Any) -> Request:
        """One more token after "Score:", for the distribution over the score digits (mode "expected").

        A justification that is longer when encoded again than it was when sampled, and then too long, is left out.
        """
        before, mark, text = self.chat.decode(completion.token_ids).rpartition("Score:")
        prefix, digits = self._score_tokens(before if mark else f"{text.rstrip()}\n")
        if len(completion.request.prompt_ids) + len(prefix) >= self.max_seq_len:
            prefix, digits = self._score_tokens("")
        ids = [*completion.request.prompt_ids, *prefix]
        return Request(prompt_ids=ids, max_new_tokens=1, temperature=0.0, logprob_token_ids=digits, metadata=metadata)

    @staticmethod
    def expected_score(completion: Completion) -> float:
        """Mean of the digits 0, 1, ... under their probabilities, renormalised."""
        from math import exp, fsum

        weights = [exp(logprob) for logprob in completion.extra_logprobs[0]]
        return fsum(k * w for k, w in enumerate(weights)) / fsum(weights)

    def _score_tokens(self, text: str) -> tuple[list[int], tuple[int, ...]]:
        """Ids of `text` up to the score digit, and the ids that the digits 0..max_score have there."""
        coded = [self.chat.encode_text(f"{text}Score: {digit}") for digit in range(int(self.config.max_score) + 1)]
        prefix, digits = coded[0][:-1], tuple(ids[-1] for ids in coded)
        if any(ids[:-1] != prefix for ids in coded) or len(set(digits)) != len(digits):
            raise UserError(
                "judge.mode=expected needs score digits of one token each, which this tokenizer has not; use cot"
            )
        return prefix, digits


def judge_replies(
    engine: Engine,
    judge: Judge,
    replies: Sequence[Reply],
    seed: int,
    on_done: Callable[[int], None] = lambda n: None,
) -> dict[str, list[Judgement]]:
    """n judgements of every reply, by reply id; a reply too long to be judged gets none."""
    collector = _Judgements(judge, engine)
    for reply in replies:
        collector.submit(reply, derive_seed(seed, "judge", reply.id), reply.id)
    results: dict[str, list[Judgement]] = {reply.id: [] for reply in replies}
    for completion in engine.stream():
        for reply_id, judgements in collector.take(completion):
            results[reply_id] = judgements
            on_done(1)
    return results


def answer(
    engine: Engine,
    chat: ChatFormat,
    config: CandidatesConfig,
    prompts: Sequence[dict[str, str]],
    seed: int,
    max_seq_len: int,
    *,
    judge: Judge | None = None,
    n: int | None = None,
    on_done: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """n answers to every prompt and, with a judge, their judgements and mean scores.

    Args:
        prompts: rows with "id" and "prompt".

    Returns:
        One record per prompt, in order: the prompt with its token ids, and "candidates", each with text, token ids,
        summed raw log-prob, finish reason, seed and, if judged, "judgements" and "score" (None: nothing parsable).
        A prompt too long for an answer has no candidates.
    """
    n = n or config.n
    records = {row["id"]: {"prompt_id": row["id"], "prompt": row["prompt"], "candidates": []} for row in prompts}
    collector = _Judgements(judge, engine) if judge else None
    waiting: dict[str, int] = {}
    for record in records.values():
        ids = chat.encode_prompt(as_messages(record["prompt"]))
        record["prompt_ids"] = ids
        if len(ids) + config.max_new_tokens > max_seq_len:
            on_done(1)
            continue
        waiting[record["prompt_id"]] = n
        engine.submit(
            [
                Request(
                    prompt_ids=ids,
                    n=n,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_new_tokens=config.max_new_tokens,
                    seed=derive_seed(seed, "answer", record["prompt_id"]),
                    stop_ids=chat.stop_ids,
                    metadata=("answer", record["prompt_id"]),
                )
            ]
        )
    for completion in engine.stream():
        kind, key = completion.request.metadata[:2]
        if kind != "answer":
            for (prompt_id, index), judgements in collector.take(completion):
                candidate = records[prompt_id]["candidates"][index]
                candidate["judgements"] = [asdict(j) for j in judgements]
                candidate["score"] = aggregate((j.score for j in judgements), min_valid=judge.config.min_valid)
                waiting[prompt_id] -= 1
                if not waiting[prompt_id]:
                    on_done(1)
            continue
        record = records[key]
        record["candidates"].append(_candidate(chat, completion))
        waiting[key] -= 1
        if waiting[key]:
            continue
        record["candidates"].sort(key=lambda candidate: candidate["index"])
        if collector is None:
            on_done(1)
            continue
        waiting[key] = n
        for candidate in record["candidates"]:
            reply = Reply(f"{key}/{candidate['index']}", record["prompt"], candidate["text"])
            if not collector.submit(reply, derive_seed(seed, "judge", reply.id), (key, candidate["index"])):
                candidate.update(judgements=[], score=None)
                waiting[key] -= 1
        if not waiting[key]:
            on_done(1)
    return list(records.values())


def _candidate(chat: ChatFormat, completion: Completion) -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": chat.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "logprob": sum(completion.logprobs),
        "finish_reason": completion.finish_reason,
        "seed": completion.request.seed,
    }


class _Judgements:
    """Collects the n judgements of each reply, with the second pass of mode "expected" where that is on."""

    def __init__(self, judge: Judge, engine: Engine) -> None:
        self.judge, self.engine = judge, engine
        self._done: dict[Any, dict[int, Judgement]] = {}

    def submit(self, reply: Reply, seed: int, key: Any) -> bool:
        """Ask for the judgements of a reply; False when it is too long."""
        request = self.judge.request(reply, seed, ("judge", key))
        if request is None:
            return False
        self._done[key] = {}
        self.engine.submit([request])
        return True

    def take(self, completion: Completion) -> Iterable[tuple[Any, list[Judgement]]]:
        """Add a completion; yields (key, judgements) when it was the last of its reply."""
        kind, key, *rest = completion.request.metadata
        done = self._done[key]
        if kind == "judge":
            judgement = self.judge.read(completion)
            if self.judge.config.mode == "expected":
                metadata = ("score", key, completion.index, judgement)
                self.engine.submit([self.judge.expected_request(completion, metadata)])
                return
            done[completion.index] = judgement
        else:
            index, judgement = rest
            expected = self.judge.expected_score(completion)
            done[index] = Judgement(judgement.text, expected, judgement.seed, judgement.finish_reason)
        if len(done) == self.judge.n:
            yield key, [done[i] for i in range(self.judge.n)]
