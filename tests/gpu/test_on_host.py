"""The CUDA ops without a GPU: csrc/cuda/*.cu, compiled as plain C++, in place of the CPU kernels.

host/host_launch.h stands in for the launches, so that the launchers, the index maps and the
arithmetic of every CUDA op come under the op tests; host/host_block.h plays the block of threads
that multiplies tiles on the tensor cores. What this cannot show: missing barriers, cuBLAS, and what
nvcc makes of the code.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from process import PACKAGE
from torch.utils import cpp_extension

TESTS = Path(__file__).resolve().parent.parent
CSRC = TESTS.parent / "csrc"

pytestmark = pytest.mark.skipif(
    not CSRC.exists(), reason="needs the source tree; this is a test of the wheel"
)


class Suite(NamedTuple):
    file: str
    chosen: str = "not same_bits"
    environment: Mapping[str, str] = {}


# The op tests, without those of thread counts and of strips, which only the CPU kernels have.
# Low-precision convolution needs cuBLAS's float32 results, the bits of a product are the library's
# affair, and im2col multiplies the padding.
SUITES = {
    "conv2d": Suite(
        "test_conv2d.py",
        "not float16 and not bfloat16 and not does_not_feel and not same_bits and not strip "
        "and not infinite_gradient",
    ),
    "implicit_gemm": Suite("gpu/test_implicit_gemm.py", "test", {"DLOPS_TEST_DEVICE": "cpu"}),
    "unfold": Suite("test_unfold.py"),
    "max_pool2d": Suite("test_max_pool2d.py"),
    "sigmoid_focal_loss": Suite("test_sigmoid_focal_loss.py"),
    "focal_loss": Suite("test_focal_loss.py"),
    "kept_gradient": Suite("test_kept_gradient.py", "test"),
    "losses": Suite("gpu/test_losses.py", "test", {"DLOPS_TEST_DEVICE": "cpu"}),
}


def compile_command(source: Path, target: Path) -> list[str | Path]:
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    texts = ("VERSION", "TORCH_VERSION", "CPU_CAPABILITIES")
    texts += ("CUDA_REASON", "CUDA_VERSION", "CUDA_ARCH_LIST")
    return [
        *os.environ.get("CXX", "g++").split(),
        *("-std=c++20", "-O1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"),
        # So GCC 12 says of torch's headers, at this level of optimisation.
        *("-Wno-unknown-warning-option", "-Wno-stringop-overflow"),
        *(flag for folder in include for flag in ("-isystem", folder)),
        *("-I", CSRC, "-I", TESTS / "gpu" / "host", "-DTORCH_EXTENSION_NAME=_C"),
        # Small, so that small cases are cut and meet every tile.
        *("-DDLOPS_WORKSPACE_BYTES=8192", "-DDLOPS_ENOUGH_TILES=8", "-DDLOPS_FEW_PARTS=2"),
        *(f'-DDLOPS_{name}=""' for name in texts),
        *("-x", "c++", "-c", source, "-o", target),
    ]


def run(command: list[str | Path]) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dlops whose kernels are those of csrc/cuda."""
    folder = tmp_path_factory.mktemp("on_host")
    copy = folder / "dlops"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    sources = [*CSRC.glob("*.cpp"), CSRC / "cpu" / "capability.cpp", *CSRC.glob("cuda/*.cu")]
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, map(compile_command, sources, objects)))
    library = Path(torch.__file__).parent / "lib"
    torch_libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    binary = copy / f"_C{EXTENSION_SUFFIXES[0]}"
    cxx = os.environ.get("CXX", "g++").split()
    run([*cxx, "-shared", "-pthread", *objects, "-L", library, *torch_libraries, "-o", binary])
    return folder


def run_suite(suite: Suite, package: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "-k", suite.chosen]
    return subprocess.run(
        [*command, str(TESTS / suite.file)],
        cwd=package,  # which comes first on the path
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "OMP_NUM_THREADS": "1",
            **suite.environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def suites(package: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Every suite at once, for they take minutes and the code under test has no threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_suite, suite, package) for name, suite in SUITES.items()}


@pytest.mark.skipif(platform.system() != "Linux", reason="links as on Linux")
@pytest.mark.parametrize("suite", SUITES)
def test_op_tests(suite: str, suites: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = suites[suite].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-2000:]
    assert int(passed[1]) > 50


@pytest.mark.parametrize("run", ["smoke focal_loss", "smoke implicit_gemm", "sanitize unfold"])
def test_what_runs_first_on_a_gpu(run: str, package: Path) -> None:
    """The scripts of scripts/gpu_check.sh, which have no time there for mistakes of their own."""
    script, part = run.split()
    folders = (package, TESTS, TESTS / "gpu")
    result = subprocess.run(
        [sys.executable, TESTS / "gpu" / f"{script}.py", part],
        cwd=package,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            "DLOPS_TEST_DEVICE": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{script}: {part}" in result.stdout


def test_divider(tmp_path: Path) -> None:
    """Multiplication in place of division, for indices."""
    source = TESTS / "gpu" / "host" / "divider.cpp"
    program = tmp_path / "divider"
    cxx = os.environ.get("CXX", "g++").split()
    run([*cxx, "-std=c++20", "-O2", "-I", CSRC, source, "-o", program])
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_it_is_the_cuda_code_that_ran(package: Path) -> None:
    """The copy registers every op for the CPU key, from csrc/cuda."""
    code = """
import dlops, torch
print(dlops.__file__)
x = torch.ones(1, 1, 3, 3, dtype=torch.int64)
try:
    dlops.functional.conv2d(x, x)
except NotImplementedError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
    )
    assert str(package) in result.stdout, result.stderr
    assert "on CUDA input must be floating-point or complex" in result.stdout
