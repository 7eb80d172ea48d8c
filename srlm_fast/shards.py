"""Files of rows that are made shard by shard: a finished row is kept at once, a complete shard is put in order.

While a shard is worked on its finished rows are in FILE.part, one a line, in the order in which they were finished. A
process that is killed has lost none of them; the next one reads the whole lines and makes the rest. When all rows are
there they are written in order under the final name, and the part is removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.rundir import atomic_file


class Shard:
    """One shard: which of its rows are finished, and where the others go as they come.

    Args:
        file: its final name.
        ids: of all its rows, in order.
        row_id: id of a finished row.
    """

    def __init__(self, file: Path, ids: Sequence[str], row_id: Callable[[dict[str, Any]], str]) -> None:
        self.file, self.ids, self.row_id = file, list(ids), row_id
        self.part = file.with_name(f"{file.name}.part")
        self._lines: dict[str, str] = {}
        self._whole = 0  # bytes of the part that are whole lines
        self._read()

    @property
    def missing(self) -> list[int]:
        """Places of the rows that are not finished."""
        return [i for i, row in enumerate(self.ids) if row not in self._lines]

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a finished row: it is in the file, out of this process, when this returns.

        Raises:
            UserError: when the file cannot be written.
        """
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with open(self.part, "ab") as file:
                if file.tell() > self._whole:  # the torn line of a killed process
                    file.truncate(self._whole)
                file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self.part}: {error.strerror or error}; free space or fix permissions, then start again"
            ) from error
        self._whole += len(line.encode())
        self._lines[self.row_id(row)] = line

    def seal(self) -> None:
        """Writes the rows in order under the final name, atomically."""
        with atomic_file(self.file) as file:
            file.writelines(self._lines[row] for row in self.ids)
        self.part.unlink(missing_ok=True)

    def _read(self) -> None:
        """Takes the rows of the part up to its first line that is torn or no JSON."""
        wanted = set(self.ids)
        try:
            content = self.part.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read {self.part}: {error}; delete it to redo that part of the run") from None
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                return
            self._whole += len(line)
            if (name := self.row_id(row)) in wanted:
                self._lines.setdefault(name, line.decode())
