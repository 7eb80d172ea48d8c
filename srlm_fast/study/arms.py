"""What a study runs: arms, each a configuration that differs from a common one in a few keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_fast.config import Config, load_config
from srlm_fast.config.tree import walk
from srlm_fast.errors import UserError


@dataclass(frozen=True)
class Arm:
    """One configuration of a study."""

    name: str  # of its run folders and in tables
    says: str  # what it changes, for the reader
    overrides: tuple[str, ...]  # section.key=value


@dataclass(frozen=True)
class Study:
    """A study file, read.

        config: tiny.yaml            the common configuration; paths are relative to the study's file
        seeds: [0, 1, 2]
        arms:
          paper: {says: as the paper does, set: {iterations: 2}}
          judge-1: {says: one judgement of an answer, set: {judge.n: 1}}

    The first arm is the one that others are compared with.
    """

    path: Path
    config: Path
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Reads and checks a study file, the configurations of all arms included.

        Raises:
            UserError: what is wrong, with the arm that it is in.
        """
        import yaml

        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read the study {path}: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or set(content) != {"config", "seeds", "arms"}:
            raise UserError(f"{path} must hold config, seeds and arms, and nothing else")
        seeds, arms = content["seeds"], content["arms"]
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise UserError(f"{path}: seeds is {seeds!r}; give a list of numbers, such as [0, 1, 2]")
        if not isinstance(arms, dict) or not arms:
            raise UserError(f"{path}: arms is empty or no mapping of names to arms")
        study = cls(
            path, path.parent / content["config"], tuple(seeds), tuple(_arm(path, *item) for item in arms.items())
        )
        for arm in study.arms:
            try:
                study.configuration(arm, seeds[0], Path("unused"))
            except UserError as error:
                raise UserError(f"{path}: arm {arm.name}: {error}") from None
        return study

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            UserError: when there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UserError(f"{self.path} has no arm {name!r}; its arms are {', '.join(arm.name for arm in self.arms)}")

    def configuration(self, arm: Arm, seed: int, root: Path) -> Config:
        """The configuration of one run, whose folder is below root."""
        return load_config(self.config, [*arm.overrides, f"seed={seed}", f"run_dir={run_folder(root, arm, seed)}"])

    def jobs(self) -> Iterator[tuple[Arm, int]]:
        """Every run: the first arm with all seeds, then seed by seed the others, so that a part is a whole study."""
        yield from ((self.arms[0], seed) for seed in self.seeds)
        yield from ((arm, seed) for seed in self.seeds for arm in self.arms[1:])


def run_folder(root: Path, arm: Arm, seed: int) -> Path:
    """Where a run of a study lies."""
    return root / f"{arm.name}-{seed}"


def _arm(path: Path, name: Any, content: Any) -> Arm:
    if not isinstance(content, dict) or set(content) != {"says", "set"} or not isinstance(content["set"], dict):
        raise UserError(f"{path}: arm {name} must hold says, a text, and set, keys with their values")
    paths = {key for key, spec, _ in walk(Config()) if spec.metadata["path"]}
    changes = {
        key: str((path.parent / value).resolve()) if key in paths else value for key, value in content["set"].items()
    }
    return Arm(str(name), str(content["says"]), tuple(f"{key}={_text(value)}" for key, value in changes.items()))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
