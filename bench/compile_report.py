"""What the Triton kernels become on A100, H100 and B200, without any of them: cross-compiled by Triton's own compiler.

    python bench/compile_report.py                  # checks all; exits with 1 if a kernel breaks a limit
    python bench/compile_report.py --markdown       # the table of bench/results/compile_report.md
    python bench/compile_report.py rms_norm swiglu  # these modules only

A module of srlm_fast.kernels takes part by a function `compile_cases()`, which makes the launches that matter (every
branch of the kernels, every block size the launchers choose) on tensors of device "meta". A launch ends where Triton
would load the binary, so what is reported is what the launchers really ask for: their signatures, alignments, constants
and numbers of warps. A kernel with `tl.dot` has to reach the tensor cores, and a register that spills is an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from types import ModuleType
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("compile_report.py: unset TRITON_INTERPRET, which keeps Triton from compiling")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import srlm_fast.kernels

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability -> bytes of shared memory that a block may opt in to (CUDA programming guide, "Compute
Capabilities")."""

TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}
"""Compute capability -> the instructions of its matrix products; on 90 these are PTX's wgmma."""


HEADING = """# What the Triton kernels compile to

Triton {triton} and its bundled ptxas, torch {torch}; no GPU. {n} binaries.

    python bench/compile_report.py --markdown > bench/results/compile_report.md

Three numbers are for sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200), one is for all of them. Registers are per
thread; stack and shared memory are bytes, the latter per block and at most 166,912, 232,448 and 232,448. A
configuration names the dtypes behind the kernel's pointers, its constants, and what is missing; "odd" are sizes that
are no multiple of 16.

"""


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration on one architecture; sizes in bytes."""

    kernel: str
    configuration: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    has_dot: bool
    tensor_cores: bool

    @property
    def product(self) -> str:
        """Where the products of the kernel's `tl.dot` run, "-" if it has none."""
        return ("yes" if self.tensor_cores else "no") if self.has_dot else "-"

    @property
    def problems(self) -> list[str]:
        """The limits it breaks."""
        found = {
            f"{self.stack} bytes of stack": self.stack,
            f"{self.spill_stores} spill stores and {self.spill_loads} loads": self.spill_stores + self.spill_loads,
            f"{self.shared} bytes of shared memory": self.shared > SHARED_LIMITS[self.arch],
            "products outside the tensor cores": self.has_dot and not self.tensor_cores,
        }
        return [problem for problem, broken in found.items() if broken]


class _Target:
    """Stands where Triton's driver would: names a GPU to compile for, and has none to launch on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _launches(arch: int) -> Iterator[dict[int, tuple[JITFunction, Any]]]:
    """Turns launches into compilations for `arch`; yields where they are collected, each configuration once."""
    launched: dict[int, tuple[JITFunction, Any]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched[id(compiled)] = self, compiled

    JITFunction.run = compile_only
    driver.set_active(_Target(arch))
    try:
        yield launched
    finally:
        JITFunction.run = run


def _configuration(compiled: Any) -> str:
    """Dtypes behind the pointers, constants, missing arguments, sizes that are no multiple of 16, warps."""
    signature, constants = compiled.src.signature, {path[0]: value for path, value in compiled.src.constants.items()}
    dtypes, parts, missing, odd = [], [], [], []
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            missing.append(name) if constants[i] is None else parts.append(f"{name}={constants[i]}")
        elif kind.startswith("*"):
            dtypes.append(kind[1:])
        elif kind in ("i32", "i64") and not compiled.src.attrs.get((i,)):
            odd.append(name)
    parts = [" ".join(dict.fromkeys(dtypes)), *parts, f"{compiled.metadata.num_warps} warps"]
    if missing:
        parts.append(f"without {' '.join(missing)}")
    if odd:
        parts.append(f"odd {' '.join(odd)}")
    return ", ".join(parts)


def _inspect(function: JITFunction, compiled: Any, arch: int) -> Compiled:
    """Reads the binary. Its instructions are listed only where they matter, as that takes most of a second."""
    has_dot = bool(re.search(r"\btt\.dot", compiled.asm["ttir"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        stack = usage["STACK"] + usage["LOCAL"]
        sass = dump("-sass") if stack or has_dot else ""
    return Compiled(
        kernel=f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}",
        configuration=_configuration(compiled),
        arch=arch,
        registers=usage["REG"],
        stack=stack,
        spill_stores=len(re.findall(r"\bSTL\b", sass)),
        spill_loads=len(re.findall(r"\bLDL\b", sass)),
        shared=compiled.metadata.shared,
        has_dot=has_dot,
        tensor_cores=bool(re.search(TENSOR_CORES[arch], sass)),
    )


def compile_all(modules: Iterable[ModuleType]) -> list[Compiled]:
    """Every launch that the modules' `compile_cases` make, for every architecture, each configuration once."""
    rows: list[Compiled] = []
    for module in modules:
        for arch in SHARED_LIMITS if hasattr(module, "compile_cases") else ():
            with _launches(arch) as launched:
                module.compile_cases()
            rows += [_inspect(function, compiled, arch) for function, compiled in launched.values()]
    return rows


def markdown(rows: list[Compiled]) -> str:
    """The table, a line for each kernel and configuration; numbers that differ between architectures in their order."""

    def cell(values: Iterable[object]) -> str:
        values = list(map(str, values))
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    lines = [
        "| kernel | configuration | registers | stack | spill stores | spill loads | shared memory | tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, configuration), group in groupby(sorted(rows, key=_place), key=lambda row: _place(row)[:2]):
        archs = list(group)
        columns = [
            (row.registers, row.stack, row.spill_stores, row.spill_loads, row.shared, row.product) for row in archs
        ]
        lines.append(f"| `{kernel}` | {configuration} | {' | '.join(map(cell, zip(*columns)))} |")
    return "\n".join(lines)


def _place(row: Compiled) -> tuple[str, str, int]:
    return row.kernel, row.configuration, row.arch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = sorted(module.name for module in pkgutil.iter_modules(srlm_fast.kernels.__path__))
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(every)}; all by default")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="write the table")
    form.add_argument("--json", action="store_true", help="write a list of objects")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(every):
        parser.error(f"no module {', '.join(sorted(unknown))} in srlm_fast.kernels")
    rows = compile_all(importlib.import_module(f"srlm_fast.kernels.{name}") for name in options.modules or every)
    problems = [f"{row.kernel} ({row.configuration}) on sm_{row.arch}: {p}" for row in rows for p in row.problems]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif options.markdown:
        print(HEADING.format(triton=triton.__version__, torch=version("torch"), n=len(rows)) + markdown(rows))
    else:
        print(f"{len(rows)} binaries of {len({row.kernel for row in rows})} kernels, {len(problems)} problems")
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
