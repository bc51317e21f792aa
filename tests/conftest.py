"""Markers for the kinds of test, the count of each at the end, and the settings of a run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

# Threads that spin while they wait would slow down everything else on a busy machine. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

KINDS = {
    "oracle": "against the NumPy loops of dlops.reference, or those against native",
    "native": "values and gradients against the native op, by the table of tolerances",
    "gradcheck": "gradients against numerical ones, at PyTorch's default tolerances",
    "exact": "bit for bit equal to native",
    "special": "NaN, infinities, ties and extreme logits",
    "layout": "strided inputs, memory format of the results",
    "memory": "what is kept for the backward pass",
    "determinism": "the same bits on every run and thread count",
    "property": "laws that hold for any shape (hypothesis)",
    "fuzz": "generated calls, valid and invalid, agree with native or are refused alike",
    "concurrency": "threads, forks, workers, exceptions",
    "large": "more than 2^31 elements: minutes and up to 15 GiB each (make test-large)",
    "invalid": "bad input is refused as native refuses it",
    "opcheck": "torch.library.opcheck on the raw operators",
    "module": "dlops.nn, convert and revert",
    "compose": "higher derivatives, transforms, compilers, modes, whole networks",
    "example": "the example trainer and the benchmarks",
    "packaging": "install, import and build",
}

_outcomes: Counter[tuple[str, str]] = Counter()

hypothesis.settings.register_profile(
    "dlops", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("dlops")


def pytest_configure(config: pytest.Config) -> None:
    for kind, meaning in KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning}")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    # Native's own, for a case that is compared with it.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """As they were, whatever a test or an example that it runs has set."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    by_themselves = pytest.mark.skip(reason="needs minutes and memory: make test-large runs these")
    no_gpu = pytest.mark.skip(reason="no CUDA device: scripts/gpu_check.sh runs these on one")
    for item in items:
        marks = [mark.name for mark in item.iter_markers()]
        kind = next((mark for mark in marks if mark in KINDS), "other")
        if "large" in marks and os.environ.get("DLOPS_TEST_LARGE") != "1":
            item.add_marker(by_themselves)
        if "gpu" in marks:
            kind += " (gpu)"
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)
        # With the report, since the test may run in another process than the count.
        item.user_properties.append(("kind", kind))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test that passes reports once, in its call; a failing fixture or a skip in its setup.
    # That a process has died is reported by another one, which knows no kind.
    if report.when == "call" or report.outcome != "passed":
        kind = dict(report.user_properties).get("kind", "other")
        _outcomes[kind, report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    columns = ("passed", "failed", "skipped")
    terminalreporter.section("tests of each kind")
    terminalreporter.write_line(f"{'kind':<20}" + "".join(f"{name:>9}" for name in columns))
    for kind in sorted({kind for kind, _ in _outcomes}):
        counts = "".join(f"{_outcomes[kind, outcome]:>9}" for outcome in columns)
        terminalreporter.write_line(f"{kind:<20}{counts}")
