"""The data card of a run: what every rule removed on the way from OASST1 and the model's own prompts to training rows.

RUN/data_card.json and RUN/data_card.md, made from the counts of the phases that are done. In every step the rows that
came in are those that each rule removed and those that were kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from srlm_fast import pairs
from srlm_fast.data import oasst, prompts
from srlm_fast.rundir import RunDir, atomic_file, write_json

FORMAT = 1
FILTERS = ("too_short", "too_long", "keyword", "opening", "duplicate", "similar")
UNPAIRED = ("too_few", "equal", "close", "identical")
OTHER_RULES = {
    "without_best": "not drawn for EFT, and the rank-0 reply is missing",
    "beyond_ift": "more than oasst.ift_examples",
    "disagree": "in no judgement of the SFT baseline that agrees with the human ranking (eft.scope, eft.ties)",
    "thinned": "discarded of the most common score (eft.max_share)",
    "capped": "more than eft.max_examples",
    "above_max_seq_len": "longer than model.max_seq_len",
    "not_sent": "requests whose demonstrations are too long for model.max_seq_len",
    "surplus": "accepted beyond prompts.count",
    "no_room": "prompts that leave no room for an answer in model.max_seq_len",
}


@dataclass(frozen=True)
class Step:
    """Rows that came in = sum of removed + sum of kept."""

    name: str
    rows: int
    removed: dict[str, int]
    kept: dict[str, int]
    meanings: Mapping[str, str] = field(default_factory=lambda: OTHER_RULES, repr=False)
    """What its rules remove."""

    def line(self) -> str:
        """The step in one line, without the rules that removed nothing."""
        removed = ", ".join(f"{rule} {n}" for rule, n in self.removed.items() if n) or "nothing"
        return (
            f"{self.name}: {self.rows} -> {', '.join(f'{n} {what}' for what, n in self.kept.items())}; less {removed}"
        )


def steps(run: RunDir) -> Iterator[Step]:
    """The steps of the phases that are done, in order."""
    if found := run.counts("prepare"):
        kept = _of(found, ("prompts", "replies"))
        yield Step("messages", found["messages"], _of(found, oasst.DEFECTS), kept, oasst.DEFECTS)
        left = _of(found, ("without_best", "beyond_ift"))
        yield Step("prompts", found["prompts"], left, _of(found, ("ift", "eft_train", "eft_eval")))
    if found := run.counts("eft/select"):
        replies = run.counts("eft/judge")["replies"]
        removed = {"disagree": replies - found["accepted"], **_of(found, ("thinned", "capped"))}
        yield Step("replies to eft_train", replies, removed, {"EFT examples": found["kept"]})
    for name in ("sft", "m1"):
        if found := run.counts(f"{name}/train"):
            rows = found["items"] + found["too_long"]
            yield Step(f"examples of {name}", rows, {"above_max_seq_len": found["too_long"]}, {"items": found["items"]})
    for t in count(1):
        found = run.counts(f"m{t}/prompts")
        if not found:
            return
        yield from _iteration(run, t, found)


def _iteration(run: RunDir, t: int, made: dict[str, Any]) -> Iterator[Step]:
    sent, cut_off = made.get("completions", 0), made.get("cut_off", 0)
    removed = {"not_sent": made["requests"] - sent, "cut_off": cut_off}
    meanings = {**OTHER_RULES, **prompts.COUNTS}
    yield Step(f"m{t}: requests for prompts", made["requests"], removed, {"completions": sent - cut_off}, meanings)
    removed = {**_of(made, FILTERS), "surplus": made.get("accepted", 0) - made["kept"]}
    yield Step(f"m{t}: proposed prompts", made.get("proposed", 0), removed, {"new prompts": made["kept"]}, meanings)
    if found := run.counts(f"m{t}/candidates"):
        removed, answered = {"no_room": found["too_long"]}, made["kept"] - found["too_long"]
        yield Step(f"m{t}: new prompts", made["kept"], removed, {"answered": answered})
    if found := run.counts(f"m{t}/pairs"):
        removed = _of(found, UNPAIRED)
        kept = {"with a pair": found["prompts"] - sum(removed.values())}
        yield Step(f"m{t}: judged prompts", found["prompts"], removed, kept, pairs.COUNTS)


def write(run: RunDir) -> None:
    """RUN/data_card.json and RUN/data_card.md.

    Raises:
        UserError: when they cannot be written.
    """
    found = list(steps(run))
    rows = [{"name": s.name, "rows": s.rows, "removed": s.removed, "kept": s.kept} for s in found]
    write_json(run / "data_card.json", {"format": FORMAT, "steps": rows})
    with atomic_file(run / "data_card.md") as file:
        file.write("# Data card\n\nRows that came in = rows that each rule removed + rows kept.\n")
        for step in found:
            file.write(f"\n## {step.name}\n\n| rows | | |\n|---|---|---|\n| came in | {step.rows} | |\n")
            file.writelines(f"| less {rule} | {n} | {step.meanings[rule]} |\n" for rule, n in step.removed.items())
            file.writelines(f"| **{what}** | {n} | |\n" for what, n in step.kept.items())


def _of(counts: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in names}
