"""Who may import whom: the imports of every file, read from its syntax tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"torch", "numpy", "safetensors", "sentencepiece"}
EXTRA = {"pyarrow", "yaml", "rich", "scipy", "jinja2", "rapidfuzz", "tokenizers", "transformers", "triton"}
LEAVES = {"errors", "seeds", "templates"}
"""Modules of a few lines that anyone may import."""
MAY_IMPORT = {
    "kernels": {"kernels", "native_ops"},
    "config": {"config"},
    "rundir": set(),
    "native_ops": set(),
    "model": {"kernels"},
    "losses": {"kernels", "losses"},
    "tokenizer": set(),
    "chat": {"tokenizer"},
    "packing": {"kernels", "native_ops"},
    "data": {"config", "data"},
    "judge": set(),
    "selection": set(),
    "pairs": {"selection"},
    "consistency": {"judge"},
    "meta_judge": {"chat", "config", "data", "engine", "judge"},
    "guards": {"config"},
    "eft": {"data", "judge"},
    "evaluate": set(),
    "parallel": {"config", "model", "parallel"},
    "lora": {"config", "kernels", "model", "parallel"},
    "model_files": {"model", "rundir"},
    "checkpoint": {"lora", "model", "model_files", "parallel"},
    "adapters": {"checkpoint", "config", "lora", "model", "model_files", "parallel", "rundir"},
    "convert": {"model", "model_files", "progress", "tokenizer"},
    "reference": {"packing", "parallel", "losses", "rundir"},
    "trainer": {"config", "kernels", "losses", "packing", "parallel", "reference", "rundir", "trainer"},
    "dataset": {"chat", "data", "losses", "packing", "tokenizer"},
    "engine": {"engine", "model", "checkpoint", "native_ops", "kernels", "parallel"},
    "rollout": {"chat", "config", "data", "engine", "judge"},
    "endpoint": {"config", "engine", "judge", "rollout"},
    "shards": {"rundir"},
    "claims": {"parallel", "progress", "rundir", "shards"},
    "head_to_head": {"judge"},
    "world": set(),
    "world_corpus": {"world"},
    "progress": set(),
}
"""Package (or module) of srlm_fast -> what it may import of srlm_fast. Those not named may import everything."""
ONLY_IN = {
    "vllm": "srlm_fast/engine/vllm.py",
    "openai": "srlm_fast/endpoint.py",
    "deepspeed": "srlm_fast/parallel/deepspeed.py",
    "torchao": "srlm_fast/trainer/eight_bit.py",
    "flash_attn": "kernels/attention.py",
    "matplotlib": "srlm_fast/study/figures.py",
    "transformers": "",
}


def files() -> dict[str, Path]:
    found = {}
    for path in [*ROOT.glob("srlm_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        relative = path.relative_to(ROOT)
        part = "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")
        found[str(relative)] = (part, path)
    return found


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere or when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("name", files())
def test_layers(name):
    part, path = files()[name]
    if part not in MAY_IMPORT:
        return
    used = {n.split(".")[1] for n in imported(path) if n.startswith("srlm_fast.")}
    unexpected = used - MAY_IMPORT[part] - LEAVES
    assert not unexpected, f"{name} imports {sorted(unexpected)}"


@pytest.mark.parametrize("name", files())
def test_outside_packages(name):
    _, path = files()[name]
    for package, place in ONLY_IN.items():
        if any(n.split(".")[0] == package for n in imported(path)):
            assert name == place, f"{name} imports {package}, which only {place or 'tests'} may"
    at_load = {n.split(".")[0] for n in imported(path, top_level_only=True)}
    heavy = at_load - set(sys.stdlib_module_names) - BASE - {"srlm_fast", "__future__", "triton"}
    assert not heavy, f"{name} imports {sorted(heavy)} when it is loaded; import them where they are used"


def test_packing_and_data_know_nothing_of_processes():
    methods = ("judge", "pairs", "selection", "consistency", "meta_judge", "eft")
    for part in (*methods, "packing", "data", "tokenizer", "chat", "model", "losses", "engine"):
        for name, (owner, path) in files().items():
            if owner == part and name != ONLY_IN["vllm"]:  # whose workers are the ranks of the run
                assert not any(n.startswith("torch.distributed") for n in imported(path)), name


def test_library_imports_with_its_four_packages_alone():
    """Everything but the driver's own needs (yaml, rich, scipy, ...) loads while those cannot be imported."""
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRA!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
for name in {sorted(MAY_IMPORT)!r}:
    if name != "convert":
        importlib.import_module("srlm_fast." + name)
import srlm_fast.iterate, srlm_fast.summary
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_script_holds_logic():
    for path in ROOT.glob("scripts/*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path
