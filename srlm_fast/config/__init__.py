"""The configuration of a run: one tree of dataclasses, read from YAML and `section.key=value` overrides.

`keys.py` has the keys with their documentation, `tree.py` reads and checks any such tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srlm_fast.config import tree
from srlm_fast.config.keys import (
    GENERATORS,
    CandidatesConfig,
    Config,
    DpoConfig,
    GuardsConfig,
    JudgeConfig,
    LoraConfig,
    MetaJudgeConfig,
    PromptsConfig,
    SftConfig,
    TrainConfig,
)
from srlm_fast.config.tree import describe, lookup, read, to_dict, walk
from srlm_fast.errors import UserError

__all__ = [
    "GENERATORS",
    "CandidatesConfig",
    "Config",
    "DpoConfig",
    "GuardsConfig",
    "JudgeConfig",
    "LoraConfig",
    "MetaJudgeConfig",
    "PromptsConfig",
    "SftConfig",
    "TrainConfig",
    "check_rates",
    "describe",
    "input_paths",
    "load_config",
    "longest_response",
    "lookup",
    "results_keys",
    "to_dict",
    "walk",
]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides; checked as far as no file is needed for it.

    Raises:
        UserError: for an unreadable file, an unknown key (with the nearest known one) or a value that is not allowed,
            or does not fit another one.
    """
    config = read(Config(), path, overrides)
    _check_together(config)
    return config


def check_rates(name: str, config: TrainConfig) -> None:
    """Raises UserError for a learning rate that would rise to the end of its schedule; `name` is the section's."""
    if config.schedule != "constant" and config.min_lr > config.lr:
        raise UserError(
            f"{name}.min_lr={config.min_lr:g}, the learning rate at the end, is above {name}.lr={config.lr:g}; lower it"
        )


def _check_together(config: Config) -> None:
    check_rates("sft", config.sft)
    check_rates("dpo", config.dpo)
    if config.judge.min_valid > config.judge.n:
        raise UserError(f"judge.min_valid={config.judge.min_valid}: must be at most judge.n={config.judge.n}")
    for name in ("prompts.max_new_tokens", "candidates.max_new_tokens", "judge.max_new_tokens"):
        if lookup(config, name) >= config.model.max_seq_len:
            raise UserError(
                f"{name}={lookup(config, name)} leaves no room for a prompt in model.max_seq_len="
                f"{config.model.max_seq_len}; lower it"
            )
    if config.reference.source == "file" and not config.reference.cache:
        raise UserError("reference.source=file needs reference.cache, the folder that holds them")
    _check_methods(config)
    longest, by = longest_response(config)
    longest_pair = config.model.max_seq_len + longest
    for name, budget, needed, what in (
        ("sft", config.sft.tokens_per_microbatch, config.model.max_seq_len, "example (model.max_seq_len)"),
        (
            "dpo",
            config.dpo.tokens_per_microbatch,
            longest_pair,
            f"pair (model.max_seq_len + {by})",
        ),
    ):
        if budget < needed:
            raise UserError(
                f"{name}.tokens_per_microbatch={budget} is smaller than the longest {what} of {needed} tokens; "
                f"raise it to {needed} or shorten these"
            )


def longest_response(config: Config) -> tuple[int, str]:
    """Most tokens of a response that pairs have, and the key that says so."""
    names = ["candidates.max_new_tokens"] + ["judge.max_new_tokens"] * config.meta_judge.enabled
    return max((lookup(config, name), name) for name in names)


def _check_methods(config: Config) -> None:
    """Refuses follow-up methods that do not go together."""
    pairs, temporal, reference = config.pairs, config.temporal, config.reference
    if not pairs.length_control:
        raise UserError("pairs.length_control is empty; give one rho, such as 0, or one for each iteration")
    if any(pairs.length_control) and pairs.select != "max_min":
        raise UserError(
            f"pairs.length_control widens max_min; pairs.select={pairs.select} does not know it: set it to 0"
        )
    if pairs.k > 1 and pairs.select != "top_bottom":
        raise UserError(f"pairs.k={pairs.k} is for pairs.select=top_bottom, not {pairs.select}")
    if temporal.anchor and pairs.select != "max_min":
        raise UserError(f"temporal.anchor works with pairs.select=max_min, not {pairs.select}")
    if temporal.future and not temporal.anchor:
        raise UserError("temporal.future needs temporal.anchor: the future model learns from anchored pairs")
    if pairs.labels == "judgements" and config.judge.n < 2:
        raise UserError(f"pairs.labels=judgements compares halves of the judgements; judge.n={config.judge.n} is one")
    if config.meta_judge.enabled and config.judge.n < 2:
        raise UserError(f"meta_judge.enabled compares judgements of an answer; judge.n={config.judge.n} is one")
    explains = config.meta_judge.enabled and config.meta_judge.mode == "cot"
    if explains and config.meta_judge.max_new_tokens >= config.model.max_seq_len:
        raise UserError(
            f"meta_judge.max_new_tokens={config.meta_judge.max_new_tokens} leaves no room for a prompt in "
            f"model.max_seq_len={config.model.max_seq_len}; lower it"
        )
    if config.judge.endpoint and (temporal.anchor or config.meta_judge.enabled or pairs.labels == "previous"):
        raise UserError(
            "judge.endpoint scores the candidates with another model; temporal.anchor, meta_judge.enabled and "
            "pairs.labels=previous compare them with judgements of the run's own: leave out one of both"
        )
    others = {
        "reference.model": reference.model != "current",
        "pairs.data": pairs.data != "replace",
        "temporal.anchor": temporal.anchor is not None,
        "meta_judge.enabled": config.meta_judge.enabled,
    }
    if config.learn_from == "positives" and (temporal.anchor or config.meta_judge.enabled or pairs.labels):
        raise UserError(
            "learn_from=positives makes no pairs, which temporal.anchor, meta_judge.enabled and pairs.labels are for: "
            "leave out one of both"
        )
    if reference.source == "rollout" and any(others.values()):
        name = next(name for name, used in others.items() if used)
        raise UserError(
            f"reference.source=rollout has the log-probs of M_t's own answers under M_t, {name}={lookup(config, name)} "
            "needs others too; use reference.source=forward"
        )


def results_keys(config: Config) -> dict[str, Any]:
    """The keys that influence results: what must not change when a run is resumed.

    Paths are left out: the run records the content of the files instead, so a run may be moved.
    """
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, spec, value in walk(config)
        if not spec.metadata["operational"] and not spec.metadata["path"]
    }


def input_paths(config: Any) -> dict[str, list[Path]]:
    """`tree.input_paths`, and the generator of new prompts where it is a folder."""
    named = tree.input_paths(config)
    if isinstance(config, Config) and config.prompts.generator not in GENERATORS:
        named["prompts.generator"] = [Path(config.prompts.generator)]
    return named
