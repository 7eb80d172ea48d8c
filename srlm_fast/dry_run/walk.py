"""What each phase of a run reads, writes and how much it runs, as far as configuration and data tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from srlm_fast.config import Config, TrainConfig
from srlm_fast.data import formats, oasst
from srlm_fast.plan import Plan
from srlm_fast.trainer import training_objective


@dataclass(frozen=True)
class Count:
    """A number, or the most that it can be; None: not known before the data are."""

    value: int | None
    most: bool = False

    def __str__(self) -> str:
        return "?" if self.value is None else f"{'at most ' if self.most else ''}{self.value:,}"

    def __mul__(self, factor: int) -> Count:
        return Count(None if self.value is None else self.value * factor, self.most)


@dataclass(frozen=True)
class Step:
    """A phase: files and folders it reads, patterns of the files it writes below the run folder, how much it runs.

    `counts` has the names of phases/NAME.json where that has them.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    counts: dict[str, Count]

    def lines(self) -> Iterator[str]:
        yield self.name
        yield f"  reads   {', '.join(self.reads)}"
        yield f"  writes  {', '.join(self.writes)}"
        yield f"  runs    {', '.join(f'{name} {count}' for name, count in self.counts.items())}"


@dataclass(frozen=True)
class Seeds:
    """What the data give, as far as they are there."""

    ift: Count
    eft_train: Count  # prompts
    eft_train_replies: Count
    eft_eval: Count
    eft_eval_replies: Count
    held_out: Count

    @classmethod
    def read(cls, config: Config) -> Seeds:
        """Counts of the data that the configuration names; its limits for those that it does not.

        Raises:
            UserError: when they cannot be read, or too little is left of them.
        """
        held_out = 0
        if config.evaluate.prompts is not None:
            held_out = len(formats.load(config.evaluate.prompts, kind="prompt")[0])
        if not config.oasst.paths:
            unknown = Count(None)
            return cls(Count(config.oasst.ift_examples, True), *[unknown] * 4, Count(held_out))
        options = config.oasst
        split = oasst.split_prompts(
            oasst.read_prompts(options.paths, lang=options.lang)[0],
            ift_examples=options.ift_examples,
            eft_share=options.eft_share,
            eft_eval_share=options.eft_eval_share,
            min_replies=options.min_replies,
            seed=config.seed,
        )
        train, held = (sum(len(prompt.replies) for prompt in part) for part in (split.eft_train, split.eft_eval))
        sizes = (len(split.ift), len(split.eft_train), train, len(split.eft_eval), held, held_out)
        return cls(*map(Count, sizes))


def walk(config: Config, plan: Plan, seeds: Seeds) -> Iterator[Step]:
    """Every phase of the driver, in its order."""
    from srlm_fast.iterate import phases  # which imports every phase

    known = Walk(config, plan, seeds)
    for name, _ in phases(config):
        yield known.step(name)


class Walk:
    """Describes phases by their names."""

    def __init__(self, config: Config, plan: Plan, seeds: Seeds) -> None:
        self.config, self.plan, self.seeds = config, plan, seeds

    def step(self, name: str) -> Step:
        """One phase. A name that is not known is an error of this module: `KINDS` has all."""
        for pattern, describe in self.KINDS.items():
            if found := re.fullmatch(pattern, name):
                return Step(name, *describe(self, *found.groups()))
        raise KeyError(name)

    @property
    def base(self) -> str:
        return "models/base" if self.config.model.random_init else "model.path"

    def _prepare(self) -> tuple:
        writes = ["data/ift.jsonl", "data/eft_train.jsonl", "data/eft_eval.jsonl"]
        writes += ["models/base/*"] * self.config.model.random_init
        counts = {name: getattr(self.seeds, name) for name in ("ift", "eft_train", "eft_eval")}
        return ("oasst.paths",), tuple(writes), counts

    def _sft(self, name: str) -> tuple:
        with_eft = self.config.eft.enabled and name != "sft"
        positive = range(1, int(name[1:])) if name != "sft" else ()
        answers = self.config.prompts.count * self.config.candidates.n
        examples = self.seeds.ift.value + self.config.eft.max_examples * with_eft + answers * len(positive)
        reads = ("data/ift.jsonl", *["eft/train.jsonl"] * with_eft, *(f"m{t}/positives.jsonl" for t in positive))
        return (self.base, *reads), self._model(name), self._training(self.config.sft, examples)

    def _positives(self, t: str) -> tuple:
        most = Count(self.config.prompts.count * self.config.candidates.n, True)
        return (f"m{t}/candidates/shard-*.jsonl",), (f"m{t}/positives.jsonl",), {"positives": most}

    def _dpo(self, after: str) -> tuple:
        if self.config.learn_from == "positives":
            return self._sft(f"m{after}")
        t = int(after) - 1
        reads = (f"models/m{t}", *self._pair_files(t), f"m{t}/reference.safetensors")
        return reads, self._model(f"m{after}"), self._training(self.config.dpo, self._most_pairs(t))

    def _future(self, t: str) -> tuple:
        reads = (f"models/m{t}", *self._pair_files(int(t), "draft_"), f"m{t}/draft_reference.safetensors")
        return reads, self._model(f"m{t}f"), self._training(self.config.dpo, self._most_pairs(int(t)))

    def _earlier(self, t: int) -> range:
        """Iterations before t whose pairs are trained on in it."""
        return range(1, t) if self.config.pairs.data == "accumulate" else range(0)

    def _pair_files(self, t: int, draft: str = "") -> list[str]:
        return [*(f"m{s}/pairs.jsonl" for s in self._earlier(t)), f"m{t}/{draft}pairs.jsonl"]

    def _made(self, t: int) -> int:
        """Most pairs that iteration t makes."""
        config, n = self.config, self.config.candidates.n
        of_answers = {"top_bottom": min(config.pairs.k, n // 2), "all": n * (n - 1) // 2}.get(config.pairs.select, 1)
        return config.prompts.count * (of_answers + (config.meta_judge.enabled and t <= config.meta_judge.iterations))

    def _most_pairs(self, t: int) -> int:
        """Most pairs that are trained on in iteration t."""
        return sum(map(self._made, [*self._earlier(t), t]))

    def _model(self, name: str) -> tuple[str, ...]:
        """What a phase of training writes."""
        return (f"models/{name}/*", *[f"adapters/{name}/*"] * (self.config.lora.rank > 0))

    def _training(self, options: TrainConfig, items: int) -> dict[str, Count]:
        steps = math.ceil(items / options.batch_size) * options.epochs
        return {"items": Count(items, True), "steps": Count(min(steps, options.max_steps or steps), True)}

    def _evaluate(self, name: str) -> tuple:
        config, writes, reads = self.config, [f"{name}/judgements/shard-*.jsonl", f"{name}/metrics.json"], []
        counts = {"judgements": self.seeds.eft_eval_replies * config.judge.n}
        if config.evaluate.prompts is not None:
            writes, reads = [f"{name}/answers/shard-*.jsonl", *writes], ["evaluate.prompts"]
            counts = {"answers": self.seeds.held_out * config.evaluate.n, **counts}
        return (f"models/{name}", "data/eft_eval.jsonl", *reads), tuple(writes), counts

    def _judge_eft(self) -> tuple:
        replies = self.seeds.eft_train_replies
        counts = {"prompts": self.seeds.eft_train, "replies": replies, "judgements": replies * self.config.eft.attempts}
        return ("models/sft", "data/eft_train.jsonl"), ("eft/judge/shard-*.jsonl",), counts

    def _select_eft(self) -> tuple:
        counts = {"kept": Count(self.config.eft.max_examples, True)}
        return ("eft/judge/shard-*.jsonl", "data/eft_train.jsonl"), ("eft/train.jsonl",), counts

    def _prompts(self, t: str) -> tuple:
        options = self.config.prompts
        by = {"base": self.base, "sft": "models/sft", "current": f"models/m{t}"}.get(
            options.generator, options.generator
        )
        counts = {"prompts": Count(options.count), "requests": Count(options.max_requests * options.count, True)}
        return (by, "data/ift.jsonl"), (f"m{t}/prompts.jsonl",), counts

    def _candidates(self, t: str) -> tuple:
        config = self.config
        answers, shards = (
            config.prompts.count * config.candidates.n,
            config.prompts.count / config.candidates.shard_size,
        )
        counts = {
            "candidates": Count(answers, True),
            "judgements": Count(answers * config.judge.n, True),
            "shards": Count(math.ceil(shards)),
            "replicas": Count(self.plan.machine.n_gpus // config.engine.tensor_parallel),
        }
        judge = [f"judge.endpoint={config.judge.endpoint}"] if config.judge.endpoint else []
        return (f"models/m{t}", f"m{t}/prompts.jsonl", *judge), (f"m{t}/candidates/shard-*.jsonl",), counts

    def _comparisons(self, t: str) -> tuple:
        prompts, n = self.config.prompts.count, self.config.judge.n
        counts = {"compared": Count(prompts, True), "comparisons": Count(prompts * n * (n - 1), True)}
        return (f"models/m{t}", f"m{t}/candidates/shard-*.jsonl"), (f"m{t}/comparisons/shard-*.jsonl",), counts

    def _answers(self, t: str, kind: str) -> tuple:
        model = self.config.temporal.anchor if kind == "past" else f"m{t}f"
        answers = self.config.prompts.count * self.config.candidates.n
        writes = (f"m{t}/{kind}/shard-*.jsonl",)
        return (f"models/{model}", f"m{t}/prompts.jsonl"), writes, {"candidates": Count(answers, True)}

    def _judged(self, t: str, kind: str) -> tuple:
        judge, read, written = f"m{t}", kind, f"{kind}_judged"
        if kind == "previous":
            judge, read, written = f"m{int(t) - 1}" if int(t) > 1 else "sft", "candidates", kind
        judgements = self.config.prompts.count * self.config.candidates.n * self.config.judge.n
        reads = (f"models/{judge}", f"m{t}/{read}/shard-*.jsonl")
        return reads, (f"m{t}/{written}/shard-*.jsonl",), {"judgements": Count(judgements, True)}

    def _pairs(self, t: str, draft: str | None) -> tuple:
        config = self.config
        others = ["comparisons"] * (config.meta_judge.enabled and int(t) <= config.meta_judge.iterations and not draft)
        others += ["previous"] * (config.pairs.labels == "previous")
        others += ["past", "past_judged"] * (config.temporal.anchor is not None)
        others += ["future", "future_judged"] * (config.temporal.future and not draft)
        reads = tuple(f"m{t}/{name}/shard-*.jsonl" for name in ("candidates", *others))
        return reads, (f"m{t}/{draft or ''}pairs.jsonl",), {"pairs": Count(self._made(int(t)), True)}

    def _reference(self, t: str, draft: str | None) -> tuple:
        objective, options = training_objective(self.config.dpo), self.config.reference
        each = (3 if objective.needs_heads else 2) * objective.needs_reference
        model = {"current": f"models/m{t}", "base": self.base}.get(options.model, f"models/{options.model}")
        reads = [*self._pair_files(int(t), draft or ""), model] + [options.cache or ""] * (options.source == "file")
        counts = {"responses": Count(each * self._most_pairs(int(t)), True)}
        return tuple(reads), (f"m{t}/{draft or ''}reference.safetensors",), counts

    KINDS: dict[str, Callable[..., tuple]] = {
        "prepare": _prepare,
        "(sft|m1)/train": _sft,
        r"m(\d+)/train": _dpo,
        r"(sft|m\d+)/evaluate": _evaluate,
        "eft/judge": _judge_eft,
        "eft/select": _select_eft,
        r"m(\d+)/prompts": _prompts,
        r"m(\d+)/candidates": _candidates,
        r"m(\d+)/comparisons": _comparisons,
        r"m(\d+)/(past|future)": _answers,
        r"m(\d+)/(past|future)_judged": _judged,
        r"m(\d+)/(previous)": _judged,
        r"m(\d+)/(draft_)?pairs": _pairs,
        r"m(\d+)/positives": _positives,
        r"m(\d+)/(draft_)?reference": _reference,
        r"m(\d+)f/train": _future,
    }
