"""Environment variables that choose how bfloat16 is multiplied on the CPU; each is read once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from process import run

import dlops

parametrize = pytest.mark.parametrize
TESTS = Path(__file__).parent
AMX, PAIRS = "DLOPS_CPU_AMX", "DLOPS_CPU_AVX512_BF16"


def has(flag: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return flag in file.read().split()
    except OSError:
        return False


def has_pairs() -> bool:
    return has("avx512_bf16") and dlops._C.build_info()["cpu_capability"] == "AVX512"


@pytest.mark.invalid
@parametrize(
    "name, value, message",
    [
        (AMX, "yes", "must be unset (bfloat16 alone), 0 (nothing) or 1"),
        (AMX, "1", "needs a CPU with AMX"),
        (PAIRS, "on", "must be unset (where it is faster than float32), 0 (never) or 1 (always)"),
        (PAIRS, "1", "needs a CPU with AVX512_BF16"),
    ],
)
def test_refused(name: str, value: str, message: str, tmp_path: Path) -> None:
    there = has("amx_bf16") if name == AMX else has_pairs()
    if value == "1" and (there or os.environ.get(name) == "1"):
        pytest.skip("the machine has it")
    code = "import dlops, torch; x = torch.ones(1, 16, 3, 3).bfloat16(); "
    code += "dlops.functional.conv2d(x, x)"
    result = run("-c", code, cwd=tmp_path, **{AMX: "0", PAIRS: "0", name: value})
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.native
@parametrize("value", ["0", "1"])
def test_bfloat16(value: str) -> None:
    """Both ways pass every test of bfloat16, whichever of them is this machine's own."""
    if value == "1" and not has_pairs():
        pytest.skip("needs AVX512_BF16")
    tests = ["test_conv2d.py", "test_conv2d_winograd.py"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "bfloat16"]
    result = run("-m", "pytest", *options, *tests, cwd=TESTS, **{AMX: "0", PAIRS: value})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
