"""Products and transposes by tiles, as programs of their own: tests/tiles/."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

pytestmark = pytest.mark.skipif(
    not CSRC.exists(), reason="needs the source tree; this is a test of the wheel"
)


def build_and_run(program: Path, source: str, *flags: str) -> None:
    """tests/tiles/`program`.cpp with csrc/cpu/`source`."""
    include = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    command: list[str | Path] = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-O1", "-g1"]
    command += ["-Wall", "-Wextra", "-Wconversion", "-Werror", *flags]
    command += ["-I", CSRC, "-I", TESTS / "tiles", *include]
    command += [TESTS / "tiles" / f"{program.name}.cpp", CSRC / "cpu" / source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_product(tmp_path: Path) -> None:
    """By AMX, whose instructions tests/tiles/played_tiles.h plays on any machine."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build_and_run(
        tmp_path / "matmul_tiles", "matmul_tiles.cpp", "-DDLOPS_PLAYED_TILES", *sanitizers
    )


@pytest.mark.parametrize("level", [0, 1, 2], ids=["baseline", "AVX2", "AVX512"])
def test_transpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    monkeypatch.syspath_prepend(CSRC.parent)
    from build_support.build_ext import CAPABILITIES

    here = torch.backends.cpu.get_cpu_capability()
    if level > 0 and not here.startswith(tuple(each.vec for each in CAPABILITIES[level:])):
        pytest.skip("this CPU has no such vectors")
    flags = [f"-DDLOPS_CAPABILITY={level}", *CAPABILITIES[level].flags]
    build_and_run(tmp_path / "transpose", "simd/transpose.cpp", *flags)
