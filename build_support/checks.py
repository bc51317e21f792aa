"""Whether this machine can build dlops; each refusal is one message with its fix."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

# pyproject.toml says the same to pip.
PYTHON_MIN = (3, 11)
TORCH_MIN = (2, 11)
TORCH_MAX = (2, 15)

COMPILER_FIX = (
    "install g++ 11 or newer (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), "
    "or name another compiler: CXX=/path/to/g++"
)
PROBE = "#include <omp.h>\n#include <span>\nint main() { return omp_get_max_threads() == 0; }\n"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ndlops: {message}\n")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_platform() -> None:
    if sys.version_info < PYTHON_MIN:
        fail(
            f"Python {platform.python_version()} is too old: dlops needs Python "
            f"{dotted(PYTHON_MIN)} or newer. Make a virtual environment with a newer one."
        )
    if not sys.platform.startswith("linux"):
        fail(f"dlops builds on Linux (x86-64 and arm64); this is {platform.system()}.")


def check_torch() -> None:
    supported = f"{dotted(TORCH_MIN)} to {dotted(TORCH_MAX)}"
    torch_range = f"torch>={dotted(TORCH_MIN)},<{TORCH_MAX[0]}.{TORCH_MAX[1] + 1}"
    fix = f"pip install '{torch_range}', then pip install --no-build-isolation ."
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            fail(f"torch is installed, but it needs {error.name!r}, which is missing. Fix: {fix}")
        fail(
            "building dlops needs torch, and there is none in the environment that builds it.\n"
            f"Fix: {fix}\n"
            "(Without --no-build-isolation pip builds in an environment of its own, which has no "
            "torch whatever you have installed.)"
        )
    except ImportError as error:
        fail(f"torch is installed, but importing it fails: {error}\nFix: {fix}")
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not found or not TORCH_MIN <= (int(found[1]), int(found[2])) <= TORCH_MAX:
        fail(f"torch {torch.__version__} is installed; dlops supports {supported}.\nFix: {fix}")


def cxx() -> list[str]:
    """The C++ compiler, chosen as torch's BuildExtension chooses it."""
    return shlex.split(os.environ.get("CXX", "c++"))


def check_compiler() -> None:
    """A C++20 compiler with OpenMP, and Python's headers."""
    compiler = cxx()
    if not compiler or not shutil.which(compiler[0]):
        fail(f"there is no C++ compiler ({shlex.join(compiler)!r} not found).\nFix: {COMPILER_FIX}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        command = [*compiler, "-std=c++20", "-fopenmp", str(source), "-o", f"{folder}/probe"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).splitlines()
        error = next((line for line in lines if "error" in line), "no message")
        fail(
            f"the C++ compiler {shlex.join(compiler)!r} cannot build C++20 with OpenMP: "
            f"{error.replace(str(source), 'probe.cpp')}\nFix: {COMPILER_FIX}"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        fail(
            f"Python's C headers are missing ({headers}/Python.h).\n"
            f"Fix: install them (Debian, Ubuntu: apt install python{dotted(sys.version_info[:2])}-"
            "dev; Fedora: dnf install python3-devel)"
        )
