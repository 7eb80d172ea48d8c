"""Rows that all ranks work on together: each claims the next shard that has no file yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from srlm_fast.parallel import World
from srlm_fast.progress import progress
from srlm_fast.rundir import RunDir
from srlm_fast.shards import Shard


class Run(Protocol):
    """What a run has to have for it."""

    run_dir: RunDir
    world: World

    def main(self, function: Callable[[], Any]) -> Any:
        """Run on rank 0 and give every rank its result, or the same UserError."""

    def check_stop(self) -> None:
        """Raise `Interrupted` when it is time to stop."""


def shard_files(run: Run, name: str, n_rows: int, size: int) -> list[Path]:
    """The files that `make_shards` makes of so many rows, in order."""
    return [run.run_dir / f"{name}/shard-{i:05d}.jsonl" for i in range((n_rows + size - 1) // size)]


def make_shards(
    run: Run,
    name: str,
    rows: Sequence[Any],
    work: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
    size: int,
) -> list[Path]:
    """`make_overlapping_shards` by work that does one shard after the other: work(rows) -> a row for each of them."""
    return make_overlapping_shards(run, name, rows, lambda parts: chain.from_iterable(map(work, parts)), size)


def make_overlapping_shards(
    run: Run,
    name: str,
    rows: Sequence[Any],
    work: Callable[[Iterator[Sequence[Any]]], Iterable[dict[str, Any]]],
    size: int,
) -> list[Path]:
    """Turn rows into files shard by shard; ranks, or groups of them, claim the shards that have no file yet.

    What comes of a row depends neither on the rank nor on other rows. The finished rows of a shard are kept as they
    come (`srlm_fast.shards`), so that a restart makes the others only.

    Args:
        run: the run; all its ranks call this.
        name: the phase; its files are NAME/shard-NNNNN.jsonl in the run folder.
        rows: what to work on, each with an id.
        work: takes the rows shard by shard, which claims them, and yields a row for each with its id ("prompt_id" or
            "id"), in any order, as finished. It may begin a shard before it is done with another.
        size: rows of a shard.

    Returns:
        All files, in order, when all ranks are done.
    """
    files = shard_files(run, name, len(rows), size)
    todo = run.main(lambda: [i for i, file in enumerate(files) if not file.exists()])
    total = sum(len(rows[i * size : (i + 1) * size]) for i in todo) // run.world.n_groups  # of this group, about
    leads = run.world.leads_group  # its other ranks work along, and write nothing
    shard_of: dict[str, Shard] = {}  # of rows under way

    def claimed_parts() -> Iterator[Sequence[Any]]:
        for claimed in run.world.claims():
            if claimed >= len(todo):
                return
            i = todo[claimed]
            part = rows[i * size : (i + 1) * size]
            shard = Shard(files[i], [_row_id(row) for row in part], _row_id) if leads else None
            missing = run.world.broadcast_in_group(shard.missing if leads else None)
            advance(len(part) - len(missing))
            if missing:
                shard_of.update((_row_id(part[k]), shard) for k in missing)
                yield [part[k] for k in missing]
            elif leads:
                shard.seal()

    with progress(name, total, unit="rows", enabled=run.world.is_main) as advance:
        for row in work(claimed_parts()):
            shard = shard_of.pop(_row_id(row))
            if leads:
                shard.add(row)
            run.check_stop()
            advance(1)
            if leads and not shard.missing:
                shard.seal()
    run.world.barrier()
    return files


def _row_id(row: Any) -> str:
    """Id of a row to work on, or of one made of it."""
    if not isinstance(row, dict):
        return row.id
    return row["prompt_id"] if "prompt_id" in row else row["id"]
