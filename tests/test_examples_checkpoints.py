"""The examples' checkpoints: never half written, never code, and where a killed run goes on."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import example_runs
import pytest
import torch
from dlops_examples import files
from dlops_examples.errors import UsageError
from process import PACKAGE

pytestmark = pytest.mark.example

CPU = torch.device("cpu")
TENSORS = 400


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"


def start_writer(path: Path) -> int:
    """A process that writes one checkpoint after the other; its id."""
    if child := os.fork():
        return child
    try:
        for step in itertools.count():
            model = {str(i): torch.full((1000,), step) for i in range(TENSORS)}
            files.save_checkpoint(path, {"identity": {}, "step": step, "model": model})
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Whenever the writer dies, the checkpoint is a whole one."""
    path = tmp_path / "last.pt"
    partial = tmp_path / ".last.pt.partial"
    half_written = 0
    for _ in range(10):
        child = start_writer(path)
        try:
            wait_until(path.exists)
            wait_until(lambda: partial.exists() and partial.stat().st_size > 500_000)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        state = files.load_checkpoint(path, CPU)
        assert len(state["model"]) == TENSORS
        assert all(bool((tensor == state["step"]).all()) for tensor in state["model"].values())
        half_written += partial.exists()
    assert half_written >= 5  # the kills did hit writers at work


def test_killed_run_resumes_with_the_same_bits(tmp_path: Path) -> None:
    quick = ("--recipe", "vanilla", "--limit", "64", "--batch-size", "16")
    script = str(example_runs.EXAMPLES / "train.py")
    endless = [*quick, "--epochs", "100000", "--threads", "1", "--out", str(tmp_path / "killed")]
    table = tmp_path / "killed" / "vanilla-dlops" / "metrics.csv"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen([sys.executable, script, *endless], env=environment)
    try:
        wait_until(lambda: table.exists() and table.read_text().count("\n") > 3)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = len(files.load_checkpoint(table.parent / "last.pt", CPU)["history"])
    epochs = ("--epochs", str(done + 2))
    resumed = example_runs.train(tmp_path / "killed", *quick, *epochs, "--resume")
    uninterrupted = example_runs.train(tmp_path / "not", *quick, *epochs)
    assert (
        example_runs.different(example_runs.weights(resumed), example_runs.weights(uninterrupted))
        == []
    )
    losses = [
        [row["train_loss"] for row in example_runs.history(run)] for run in (resumed, uninterrupted)
    ]
    assert losses[0] == losses[1]


def test_failed_write_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.save_json(path, {"epoch": 1})

    def fail(file: BinaryIO) -> None:
        file.write(b"{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files._replace(path, fail)
    assert json.loads(path.read_text()) == {"epoch": 1}


class Payload:
    """What a crafted checkpoint holds: a call, made when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_crafted_checkpoints_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    quick = ("--recipe", "vanilla", "--limit", "32", "--epochs", "1")
    path = example_runs.train(tmp_path, *quick) / "last.pt"
    good = files.load_checkpoint(path, CPU)

    def refused() -> str:
        line = example_runs.refusal(capsys, *quick, "--resume", "--out", str(tmp_path))
        assert not trace.exists()
        return line

    torch.save(good | {"identity": Payload(trace)}, path)
    assert f"{path} is no checkpoint of this trainer" in refused()
    path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    assert f"{path} is no checkpoint of this trainer" in refused()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # opened carelessly, the file does run code


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    files.save_checkpoint(path, {"identity": {}, "model": {"weight": torch.zeros(5000)}})
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], good[:-30], b"\0" * len(good)):
        path.write_bytes(bad)
        with pytest.raises(UsageError, match=r"is no checkpoint of this trainer \(.*: delete it"):
            files.load_checkpoint(path, CPU)
    torch.save({"model": {}}, path)
    with pytest.raises(UsageError, match="is no checkpoint of this trainer"):
        files.load_checkpoint(path, CPU)
