"""scripts/gpu_check.sh and what it is made of, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent / "scripts"
if not SCRIPTS.is_dir():
    pytest.skip("the scripts are not beside these tests", allow_module_level=True)

pytestmark = pytest.mark.packaging

SUITE = """
import os, pathlib, torch

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_after(): pass
def test_fault(monkeypatch):
    def dead(): raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead
"""


def run_suite(folder: Path, results: str, **env: str) -> list[dict[str, str]]:
    """The outcomes that the plugin wrote, of a suite with a failure and a kernel's fault."""
    (folder / "test_suite.py").write_text(SUITE)
    # This process may be a worker of pytest-xdist itself; that one is not.
    own = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n1", "-p", "gpu_plugin", "test_suite.py"],
        cwd=folder,
        env={
            **own,
            "PYTHONPATH": str(TESTS / "gpu"),
            "DLOPS_GPU_RESULTS": str(folder / results),
            "DLOPS_GPU_SUITE": "suite",
            **env,
        },
        capture_output=True,
        timeout=120,
    )
    return [json.loads(line) for line in (folder / results).read_text().splitlines()]


def test_a_second_run_leaves_out_what_has_passed(tmp_path: Path) -> None:
    found = run_suite(tmp_path, "first")
    outcomes = {line["id"].partition("::")[2]: line["outcome"] for line in found}
    # The fault is laid to the test that caused it, though its assertions held.
    assert outcomes == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_after": "passed",
        "test_fault": "failed",
    }
    (why,) = (line["why"] for line in found if line["id"].endswith("test_wrong"))
    assert "assert 1 == 2" in why

    by_outcome = {
        name: [line["id"] for line in found if line["outcome"] == name]
        for name in ("passed", "failed")
    }
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"tests": {"suite": by_outcome}}))
    again = run_suite(tmp_path, "second", DLOPS_GPU_BEFORE=str(before))
    assert {line["id"] for line in again} == set(by_outcome["failed"])


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [SCRIPTS / "gpu_check.sh", "first"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "OUT": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "sees no CUDA device" in result.stdout
    (step,) = json.loads((tmp_path / "gpu_check-first.json").read_text())["steps"]
    assert (step["name"], step["status"]) == ("device", "failed (1)")
    assert "sees no CUDA device" in (tmp_path / "gpu_check-first.log").read_text()


def test_unknown_parts_are_refused() -> None:
    result = subprocess.run(
        [SCRIPTS / "gpu_check.sh", "test"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "there is no part test; first, second, or some of" in result.stdout


def test_shell_scripts_parse() -> None:
    for script in sorted(SCRIPTS.glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
