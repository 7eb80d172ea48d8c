"""Generation engines. `load_engine("native")` is ours; every engine follows `Engine` in base.py."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from srlm_fast.engine.base import Completion, Engine, EngineStats, Request
from srlm_fast.errors import UserError

__all__ = ["ENGINES", "Completion", "Engine", "EngineStats", "Request", "load_engine"]

ENGINES = {"native": "srlm_fast.engine.native:NativeEngine", "vllm": "srlm_fast.engine.vllm:VllmEngine"}
"""Name of an engine -> module:class, imported when it is asked for."""


def load_engine(name: str, **options: Any) -> Engine:
    """Makes the engine called `name`; `options` are those of its class. Call its `load` before the first request.

    Raises:
        UserError: for a name that is not in `ENGINES`.
    """
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ENGINES)}"
        raise UserError(f"unknown engine {name!r}; {hint}")
    module, _, cls = ENGINES[name].partition(":")
    return getattr(import_module(module), cls)(**options)
