"""The product by AMX, whose instructions tests/tiles/played_tiles.h plays on any machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


@pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree; this is a test of the wheel")
def test_product(tmp_path: Path) -> None:
    program = tmp_path / "matmul_tiles"
    include = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    command: list[str | Path] = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-O1", "-g1"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-DDLOPS_PLAYED_TILES"]
    command += ["-I", CSRC, "-I", TESTS / "tiles", *include]
    command += [TESTS / "tiles" / "matmul_tiles.cpp", CSRC / "cpu" / "matmul_tiles.cpp"]
    built = subprocess.run([*command, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
