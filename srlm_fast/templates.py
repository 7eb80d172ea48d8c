"""Prompts in files: texts with places in braces."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from srlm_fast.errors import UserError


def read_template(path: str | Path, places: Sequence[str], what: str) -> str:
    """Text of a prompt file that holds each of the places in braces; UserError otherwise."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the {what} template ({error})") from None
    missing = sorted(name for name in places if f"{{{name}}}" not in template)
    if missing:
        named = " and ".join(f"{{{name}}}" for name in missing)
        raise UserError(f"{path}: the {what} template has no place {named}; write it where that text belongs")
    return template


def fill_template(template: str, texts: Mapping[str, str]) -> str:
    """A template with its places filled in one pass, so that a text that says "{response}" is not filled again."""
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda place: texts[place[1]], template)
