"""A configuration as a tree of dataclasses: keys, YAML, `section.key=value` overrides, checks, `--help`."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from srlm_fast.errors import UserError

Tree = TypeVar("Tree")


def key(
    default: Any,
    doc: str,
    *,
    path: bool = False,
    choices: Sequence[str] = (),
    operational: bool = False,
    least: float = 0,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A configuration field: its default, its documentation, and what is allowed.

    Args:
        path: a file or folder; relative ones in a YAML file are relative to that file's folder.
        choices: the words allowed.
        operational: does not influence any result, so it may differ when a run is resumed.
        least, most, above, below: bounds of a number, the first two included.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"doc": doc, "path": path, "choices": tuple(choices), "operational": operational, "bounds": bounds}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, dataclass field, value) of every key."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec, value


def lookup(config: Any, name: str) -> Any:
    """Value of a dotted key."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def read(tree: Tree, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Tree:
    """Puts a YAML file, then `section.key=value` overrides over the values of a tree, and checks choices and bounds.

    Raises:
        UserError: for an unreadable file, an unknown key (with the nearest known one) or a value that is not allowed.
    """
    import yaml

    if path is not None:
        try:
            changes = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the configuration {path}: {error}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(changes, dict):
            raise UserError(f"{path} must hold a mapping of keys, got {type(changes).__name__}")
        _apply(tree, changes, tree, "", str(path), Path(path).resolve().parent)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        changes = value
        for part in reversed(name.split(".")):
            changes = {part: changes}
        _apply(tree, changes, tree, "", "command line", Path.cwd())
    _check(tree)
    return tree


def _check(tree: Any) -> None:
    """Refuses a word that is no choice and a number out of bounds."""
    for name, spec, value in walk(tree):
        choices = spec.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(name, number, spec.metadata["bounds"])


def _check_number(name: str, value: Any, bounds: dict[str, float]) -> None:
    """Refuses a number out of bounds; anything else passes."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most, above, below = bounds.values()
    if math.isfinite(value) and least <= value <= most and above < value < below:
        return
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={value}: must be a number and not negative")
    limits = {"at least": least or -math.inf, "above": above, "at most": most, "below": below}
    words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    raise UserError(f"{name}={value}: must be {' and '.join(words)}")


def _apply(section: Any, changes: dict[str, Any], root: Any, prefix: str, source: str, folder: Path) -> None:
    known = {spec.name: spec for spec in fields(section)}
    hints = get_type_hints(type(section))
    for name, value in changes.items():
        dotted = f"{prefix}{name}"
        if name not in known:
            raise UserError(f"{source}: unknown key {dotted!r}{_nearest(dotted, root)}")
        if is_dataclass(getattr(section, name)):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {dotted} is a section of keys, got {value!r}")
            _apply(getattr(section, name), value, root, f"{dotted}.", source, folder)
            continue
        if get_origin(hints[name]) is dict:
            _merge(getattr(section, name), value, dotted, source)
            continue
        value = _coerce(value, hints[name], dotted, source)
        if known[name].metadata.get("path") and value:
            value = tuple(str(folder / p) for p in value) if isinstance(value, tuple) else str(folder / value)
        setattr(section, name, value)


def _merge(mapping: dict[str, Any], changes: Any, dotted: str, source: str) -> None:
    """Set the names of a mapping, and take out those that are none."""
    if not isinstance(changes, dict):
        raise UserError(f"{source}: {dotted} is a mapping of names to values, got {changes!r}")
    for name, value in changes.items():
        if value is None or value == "none":
            mapping.pop(str(name), None)
        elif isinstance(value, (bool, int, float, str)):
            mapping[str(name)] = value
        else:
            raise UserError(f"{source}: {dotted}.{name}={value!r}: must be a number, a word, true, false or none")


def _nearest(dotted: str, root: Any) -> str:
    names = [name for name, _, _ in walk(root)]
    if dotted in names:
        section, _, name = dotted.partition(".")
        return f"; write it inside its section, {section}: {{{name}: ...}}"
    close = get_close_matches(dotted, names, n=1, cutoff=0.5)
    if not close:
        close = [name for name in names if name.rsplit(".", 1)[-1] == dotted.rsplit(".", 1)[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the keys"


def _coerce(value: Any, hint: Any, dotted: str, source: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        if get_origin(option) is tuple:
            kind, *_ = get_args(option)
            items = value if isinstance(value, (list, tuple)) else [value]
            if kind is float:
                return tuple(_coerce(item, float, dotted, source) for item in items)
            if all(isinstance(item, kind) for item in items):
                return tuple(items)
        elif option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        elif option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        elif option is bool and isinstance(value, bool):
            return value
        elif option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    wanted = " or ".join("none" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{source}: {dotted}={value!r}: must be {wanted}")


def input_paths(tree: Any) -> dict[str, list[Path]]:
    """The files and folders that a configuration reads, by key; empty ones and operational ones are left out."""
    named = {}
    for name, spec, value in walk(tree):
        if spec.metadata["path"] and not spec.metadata["operational"] and value:
            named[name] = [Path(path) for path in (value if isinstance(value, tuple) else (value,))]
    return named


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict, as is written to config.yaml (tuples become lists)."""
    return json.loads(json.dumps(asdict(config)))


def describe(tree: Any) -> str:
    """Every key with its default and documentation, one a line."""
    lines = []
    for name, spec, value in walk(tree):
        lines.append(f"  {name} = {json.dumps(value)}\n      {spec.metadata['doc']}")
        if spec.metadata["choices"]:
            lines[-1] += f" [{' | '.join(spec.metadata['choices'])}]"
    return "\n".join(lines)
