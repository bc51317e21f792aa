"""pytest -p gpu_plugin: for a run on a GPU that may end before its time (scripts/gpu_check.sh).

DLOPS_GPU_RESULTS=file   each outcome goes there at once, a line of JSON
DLOPS_GPU_BEFORE=file    what an earlier run found: tests that passed in its DLOPS_GPU_SUITE are
                         left out, and those that failed come first

A process whose device a kernel has put out of use ends, and pytest-xdist starts another one: else
every test after that one would fail with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = os.environ.get("DLOPS_GPU_BEFORE")
    if not path:
        return
    found = json.loads(Path(path).read_text())["tests"].get(os.environ["DLOPS_GPU_SUITE"], {})
    passed, failed = (set(found.get(outcome, [])) for outcome in ("passed", "failed"))
    done = passed - failed
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
    items.sort(key=lambda item: item.nodeid not in failed)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("DLOPS_GPU_RESULTS")
    # With xdist every report comes by twice: in a worker, and where all come together.
    if not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        line = {"id": report.nodeid, "outcome": report.outcome}
        if report.failed:
            line["why"] = report.longreprtext[-2000:]
        with Path(path).open("a") as file:
            print(json.dumps(line), file=file)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("DLOPS_GPU_BEFORE") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all of them have passed before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
