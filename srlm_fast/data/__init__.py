"""Rows of data files and the few shapes that every reader makes of them."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from srlm_fast.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""

    id: str
    prompt: str | list[Message]  # a string is one user message
    response: str


@dataclass(frozen=True)
class RankedPrompt:
    """A prompt and its human-ranked replies."""

    id: str
    prompt: str
    replies: list[tuple[str, int]]  # (text, rank), rank 0 is the best
    quality: float | None = None  # quality labels of the prompt and of its rank-0 reply, summed; None without labels


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """The chat messages of a prompt."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", value) of a .jsonl file, or ("file[index]", value) of a .json file that holds one array.

    Lines are streamed, blank ones passed over; gzip is told by the content, whatever the name. Lone surrogates, which
    JSON can name and no file can hold, become U+FFFD. Raises UserError for a missing or unreadable file and for broken
    JSON or text, naming the line.
    """
    path = Path(path)
    check_file(path)
    try:
        with _open(path) as file:
            yield from (_array if path.name.removesuffix(".gz").endswith(".json") else _lines)(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read to its end ({error})") from None


def check_file(path: Path) -> None:
    """Raises UserError when there is no file."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder; name the files in it' if path.is_dir() else 'no such file'}")


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _array(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    rows = _parse(file.read(), f"{path}")
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one {type(rows).__name__}, not an array of rows; name it .jsonl if it is lines")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _parse(raw: bytes, where: str) -> Any:
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text)
        if _SURROGATE.search(text):
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return value
    except json.JSONDecodeError as error:
        line = "" if where.rpartition(":")[2].isdigit() else f", line {error.lineno}"
        what = error.msg.removesuffix(" at")
        raise UserError(f"{where}: broken JSON ({what}{line} at column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
