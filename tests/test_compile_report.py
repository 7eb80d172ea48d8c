"""Every Triton kernel compiles for A100, H100 and B200 without spilling, and its products reach the tensor cores."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux only"),
]


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Python where Triton compiles, with the report and these tests at hand."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "bench", ROOT / "tests")))
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def launched_kernels() -> set[str]:
    """module.function of all functions under @triton.jit that are launched: by convention, *_kernel."""
    found = set()
    for path in ROOT.glob("kernels/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            jit = isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
            if jit and node.name.endswith("_kernel"):
                found.add(f"{path.stem}.{node.name}")
    return found


def test_every_kernel_compiles_for_every_architecture():
    done = python("bench/compile_report.py", "--json")
    assert done.stdout, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    for arch, limit in SHARED_LIMITS.items():
        here = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"] for row in here} == launched_kernels()
        assert all(row["shared"] <= limit for row in here), done.stderr
    assert not any(row["stack"] or row["spill_stores"] or row["spill_loads"] for row in rows), done.stderr
    assert all(row["registers"] and row["tensor_cores"] == row["has_dot"] for row in rows), done.stderr
    assert done.returncode == 0, done.stderr


def test_products_and_spills_are_seen():
    code = """
import json
from dataclasses import asdict
import compile_probe, compile_report
print(json.dumps([{**asdict(row), "problems": row.problems} for row in compile_report.compile_all([compile_probe])]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {(row["kernel"], row["arch"]): row for row in json.loads(done.stdout)}
    for arch in SHARED_LIMITS:
        product, spilling = (rows[f"compile_probe.{name}_kernel", arch] for name in ("product", "spilling"))
        assert product["has_dot"] and product["tensor_cores"] and product["shared"] >= 4 * 64 * 64
        assert product["problems"] == [] and not spilling["has_dot"]
        assert min(spilling["stack"], spilling["spill_stores"], spilling["spill_loads"]) > 100
        assert len(spilling["problems"]) == 2
