"""Packages, and the native operators of csrc/ built by CMake.

The operators are an extra: where CMake, a C++ compiler or torch is missing the install goes on without them, a line
says so, and `srlm_fast.native_ops` runs its plain-Python versions.

    pip install -e .                          # builds the operators against the torch of this environment
    python setup.py build_ext --inplace       # builds them again, in place
"""

import platform
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
CAPABILITIES = ("default", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("default",)


def torch_folder() -> Path | None:
    """The installed torch package, without importing it.

    pip's isolated build hides site-packages from `import` but keeps the interpreter's paths, so the folder is looked
    for there as well: otherwise `pip install -e .` would fetch a second (CUDA) torch only to compile one file.
    """
    spec = find_spec("torch")
    found = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("purelib")) / "torch"
    return found if (found / "include" / "torch").is_dir() else None


class CMakeBuild(build_ext):
    """Builds csrc/ into srlm_fast/libsrlm_<instruction set>.so; never fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extensions(self) -> None:
        reason = self.compile()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            if reason:
                target.unlink(missing_ok=True)  # rather none than one of older sources
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")
            shutil.copyfile(BUILD / target.name, fresh)
            fresh.replace(target)  # a process that has the old file loaded keeps it
        if reason:
            print(f"srlm-fast: native operators not built ({reason}); the plain-Python ones will be used", flush=True)

    def compile(self) -> str | None:
        """Runs CMake; returns why there is no result, if there is none."""
        torch = torch_folder()
        if not shutil.which("cmake"):
            return "no cmake on PATH"
        if torch is None:
            return "no torch in this environment; install torch, then run `python setup.py build_ext --inplace`"
        steps = (
            ["cmake", "-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_DIR={torch}"],
            ["cmake", "--build", BUILD, "--parallel"],
        )
        for step in steps:
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(done.stdout, flush=True)
                shutil.rmtree(BUILD, ignore_errors=True)  # a failed configuration would be remembered
                return f"`{' '.join(map(str, step[:2]))}` failed, see above"
        return None


setup(
    packages=find_packages(include=["srlm_fast", "srlm_fast.*"]) + ["srlm_fast.kernels"],
    # A top-level package named `kernels` would shadow the PyPI package of that name, which transformers imports.
    package_dir={"srlm_fast.kernels": "kernels"},
    ext_modules=[Extension(f"srlm_fast.libsrlm_{name}", sources=[], optional=True) for name in CAPABILITIES],
    cmdclass={"build_ext": CMakeBuild},
)
