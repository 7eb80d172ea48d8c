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
    JudgeConfig,
    LoraConfig,
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
    "JudgeConfig",
    "LoraConfig",
    "PromptsConfig",
    "SftConfig",
    "TrainConfig",
    "describe",
    "input_paths",
    "load_config",
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


def _check_together(config: Config) -> None:
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
    longest_pair = config.model.max_seq_len + config.candidates.max_new_tokens
    for name, budget, needed, what in (
        ("sft", config.sft.tokens_per_microbatch, config.model.max_seq_len, "example (model.max_seq_len)"),
        (
            "dpo",
            config.dpo.tokens_per_microbatch,
            longest_pair,
            "pair (model.max_seq_len + candidates.max_new_tokens)",
        ),
    ):
        if budget < needed:
            raise UserError(
                f"{name}.tokens_per_microbatch={budget} is smaller than the longest {what} of {needed} tokens; "
                f"raise it to {needed} or shorten these"
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


def input_paths(config: Config) -> dict[str, list[Path]]:
    """`tree.input_paths`, and the generator of new prompts where it is a folder."""
    named = tree.input_paths(config)
    if config.prompts.generator not in GENERATORS:
        named["prompts.generator"] = [Path(config.prompts.generator)]
    return named
