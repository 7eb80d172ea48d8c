"""Packages, and the native operators of csrc/ built by CMake.

The operators are an extra: where CMake, a C++ compiler or torch is missing the install goes on without them, a line
says so, and `srlm_fast.native_ops` runs its plain-Python versions.

    pip install -e .                          # builds the operators against the torch of this environment
    python setup.py build_ext --inplace       # builds them again, in place

They are built for the instruction set that torch chooses on this machine. For a folder or a wheel that several machines
use, SRLM_CAPABILITIES="default;avx2;avx512" builds them for others too.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def torch_folder() -> Path | None:
    """The installed torch package, without importing it.

    pip's isolated build hides site-packages from `import` but keeps the interpreter's paths, so the folder is looked
    for there as well: otherwise `pip install -e .` would fetch a second (CUDA) torch only to compile one file.
    """
    spec = find_spec("torch")
    found = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("purelib")) / "torch"
    return found if (found / "include" / "torch").is_dir() else None


def capability(torch: Path) -> str:
    """The instruction set that torch chooses on this machine, as CMakeLists.txt names it."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "PYTHONPATH": str(torch.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(done.stdout.strip(), "default")


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"libsrlm_*{SUFFIX}"))


def replace_libraries(folder: Path) -> None:
    """Leaves exactly the libraries that were just built in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    built = {path.name for path in libraries(BUILD)}
    for old in libraries(folder):
        if old.name not in built:
            old.unlink()
    for name in built:
        fresh = folder / f"{name}.new"
        shutil.copyfile(BUILD / name, fresh)
        fresh.replace(folder / name)  # a process that has the old file loaded keeps it


class CMakeBuild(build_ext):
    """Builds csrc/ into srlm_fast/libsrlm_<instruction set>.so; never fails the install."""

    def get_outputs(self) -> list[str]:
        return [str(path) for path in libraries(Path(self.build_lib) / "srlm_fast")]

    def build_extensions(self) -> None:
        reason = self.compile()
        if reason:
            shutil.rmtree(BUILD, ignore_errors=True)  # rather no libraries than some of older sources
            print(f"srlm-fast: native operators not built ({reason}); the plain-Python ones will be used", flush=True)
        replace_libraries(Path(self.build_lib) / "srlm_fast")

    def copy_extensions_to_source(self) -> None:
        replace_libraries(ROOT / "srlm_fast")

    def compile(self) -> str | None:
        """Runs CMake; returns why there is no result, if there is none."""
        torch = torch_folder()
        if not shutil.which("cmake"):
            return "no cmake on PATH"
        if torch is None:
            return "no torch in this environment; install torch, then run `python setup.py build_ext --inplace`"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "TORCH_DIR": torch,
            "SRLM_CAPABILITIES": os.environ.get("SRLM_CAPABILITIES") or capability(torch),
            "BUILD_TESTING": "OFF",
        }
        steps = (
            ["cmake", "-S", ROOT, "-B", BUILD, *(f"-D{name}={value}" for name, value in options.items())],
            ["cmake", "--build", BUILD, "--parallel"],
        )
        for step in steps:
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(done.stdout, flush=True)
                return f"`{' '.join(map(str, step[:2]))}` failed, see above"
        return None


setup(
    packages=find_packages(include=["srlm_fast", "srlm_fast.*"]) + ["srlm_fast.kernels"],
    # A top-level package named `kernels` would shadow the PyPI package of that name, which transformers imports.
    package_dir={"srlm_fast.kernels": "kernels"},
    ext_modules=[Extension("srlm_fast.libsrlm", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
