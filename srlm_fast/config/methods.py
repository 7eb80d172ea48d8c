"""Keys of what is built from judged candidates: pairs, the follow-up methods, and the guards of a run.

docs/methods.md has the methods with their papers. Defaults are the paper's own loop (arXiv 2401.10020); those below a
switch that is off by default are the values of the method's paper, "choice" where it gives none.
"""

from __future__ import annotations

from dataclasses import dataclass

from srlm_fast.config.tree import key


@dataclass
class PairsConfig:
    select: str = key(
        "max_min",
        "which answers of a prompt are paired: max_min, the best with the worst; max_random, the best with any worse "
        "one; max_median, the best with the middle one; top_bottom, the k best with the k worst; all, every two whose "
        "scores differ",
        choices=("max_min", "max_random", "max_median", "top_bottom", "all"),
    )
    k: int = key(1, "pairs of a prompt with pairs.select=top_bottom", least=1)
    margin: float = key(0.0, "least difference of the scores of a pair; 0: any above 0")
    length_control: tuple[float, ...] = key(
        (0.0,),
        "rho of Meta-Rewarding, for each iteration, the last one for all further: the shortest answer with a score in "
        "the upper share rho of the range is chosen, the longest in the lower share rejected; 0: by score alone",
        most=0.5,
    )
    ties: str = key(
        "random", "which of several answers tied at an end is taken (choice)", choices=("random", "first", "length")
    )
    keep_truncated: bool = key(True, "whether answers cut off at the token limit may enter a pair (choice)")
    data: str = key(
        "replace",
        "pairs that M_(t+1) learns from: replace, those of M_t alone; accumulate, those of M_1 to M_t",
        choices=("replace", "accumulate"),
    )
    labels: str | None = key(
        None,
        "probability that the chosen answer is the better one, for losses that read it: scores, 1 / (1 + exp(rejected "
        "- chosen)) of the two scores; previous, CREAM's consistency of M_t's ranking with that of the model before; "
        "judgements, with that of the other half of M_t's judgements; none: pairs have no label",
        choices=("scores", "previous", "judgements"),
    )
    label_scope: str = key(
        "mean",
        "CREAM's consistency: mean, one value for all pairs of an iteration; prompt, that of its own prompt",
        choices=("mean", "prompt"),
    )


@dataclass
class MetaJudgeConfig:
    enabled: bool = key(
        False, "Meta-Rewarding: pairs of judgements are judged as well and trained on beside the answers"
    )
    iterations: int = key(2, "iterations, from the first on, with judge pairs", least=1)
    mode: str = key(
        "cot",
        'cot, an explanation that ends in the winner; direct, the likelier number behind "Winner:", without a text '
        "(choice, for models that cannot keep to a format)",
        choices=("cot", "direct"),
    )
    max_new_tokens: int = key(512, "most tokens of a comparison; it is sampled as judgements are (choice)", least=1)
    max_chosen_tokens: int | None = key(
        384, "judge pairs whose chosen judgement is longer are dropped; none: none are (length: choice)", least=1
    )
    max_share: float = key(
        1.0, "most share of judge pairs among all pairs of an iteration (NeMo-Aligner advises 0.15)", above=0, most=1
    )
    template: str | None = key(
        None,
        "file of a prompt with {instruction}, {response}, {first} and {second} places; none: the built-in one",
        path=True,
    )


@dataclass
class TemporalConfig:
    anchor: str | None = key(
        None,
        "Temporal Self-Rewarding: a past model whose answers are rejected where they are worse than all of M_t's; m1 "
        "is the paper's; none: off",
        choices=("sft", "m1"),
    )
    future: bool = key(
        False, "a model trained on the pairs of M_t answers too, and its answers are chosen where better than M_t's"
    )


@dataclass
class GuardsConfig:
    action: str = key(
        "warn",
        "what follows when a bound is crossed: a warning, or the end of the run once the phase is recorded",
        choices=("warn", "stop"),
        operational=True,
    )
    score_share: float | None = key(
        0.8,
        "most share of the most common score among the judgements of the candidates; none: unguarded",
        operational=True,
        most=1,
    )
    score_entropy: float | None = key(None, "least entropy of these scores, in bits; none: unguarded", operational=True)
    length_ratio: float | None = key(
        1.5, "most ratio of the mean length of answers to that of the model before; none: unguarded", operational=True
    )
    judge_drop: float | None = key(
        0.05,
        "most that the judge's pairwise accuracy may be below its best since M1; none: unguarded",
        operational=True,
        most=1,
    )
    chosen_fall: float | None = key(
        10.0,
        "most nats that the log-probability of a chosen response may be below its reference, mean over the last tenth "
        "of the steps; none: unguarded",
        operational=True,
    )
