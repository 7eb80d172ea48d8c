"""The run folder of a configuration: the loop's, that of one training or evaluation, and those of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srlm_fast.config import input_paths, results_keys, to_dict
from srlm_fast.errors import UserError
from srlm_fast.rundir import RunDir, atomic_file, fingerprint


def existing_inputs(config: Any) -> dict[str, list[Path]]:
    """The files and folders that a configuration reads, by key.

    Raises:
        UserError: naming the key of one that is not there.
    """
    named = input_paths(config)
    for name, paths in named.items():
        for path in paths:
            if not path.exists():
                raise UserError(f"{name}: {path} does not exist")
    return named


def match(run: RunDir, config: Any) -> None:
    """Create a run, or check that an existing one was made with the same keys and inputs.

    Raises:
        UserError: as `RunDir.open`.
    """
    inputs = {name: "+".join(map(fingerprint, paths)) for name, paths in input_paths(config).items()}
    run.open(results_keys(config), inputs)


def open_run(run: RunDir, config: Any) -> None:
    """The same, then lock the run and write its config.yaml. Rank 0 calls it.

    Raises:
        UserError: as `RunDir.open` and `RunDir.lock`.
    """
    import yaml

    match(run, config)
    run.lock()
    with atomic_file(run / "config.yaml") as file:
        yaml.safe_dump(to_dict(config), file, sort_keys=False)
