"""The same command under torchrun: two processes train what one trains."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import example_runs
import process
import pytest

pytestmark = pytest.mark.example

# Without batch norm and dropout, which two processes compute differently. 321 images: the last
# batch of an epoch has one image, so the second process has none. At rates of 0.02 and above a step
# multiplies roundings: then the two runs on torch.nn differ by 1e-5 after three epochs as well.
RECIPE = ("--recipe", "vanilla", "--batch-size", "32", "--lr", "0.01", "--limit", "321")
AUGMENT = ("--set", 'augment=[{name="RandomCrop", size=32, padding=2}]')
COMMAND = (*RECIPE, *AUGMENT)


def torchrun(out: Path, *arguments: str) -> tuple[Path, str]:
    """Train with two processes; the folder of the run and what was printed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = example_runs.EXAMPLES / "train.py"
    options = (*COMMAND, *arguments, "--threads", "1", "--out", out)
    result = process.run(*launcher, script, *options, cwd=out.parent, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return out / "vanilla-dlops", result.stdout


def assert_same_curves(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train_loss", "test_loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
        for key in ("train_accuracy", "test_accuracy"):
            assert a[key] == pytest.approx(b[key], abs=1.5 / 321)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Loss curves and metrics agree, and either continues from the other's checkpoint."""
    one = example_runs.train(tmp_path / "one", *COMMAND, "--epochs", "2")
    two, printed = torchrun(tmp_path / "two", "--epochs", "2")
    losses = [row["train_loss"] for row in example_runs.history(one)]
    assert losses[1] < 0.8 * losses[0]  # there is a curve to follow
    assert_same_curves(example_runs.history(two), example_runs.history(one))
    metrics = example_runs.metrics(two)
    assert metrics["processes"] == 2
    assert sum(map(sum, metrics["confusion"])) == 321
    for line in ("test accuracy", "Conv2d", "2 processes"):
        assert printed.count(line) == 1

    shutil.copytree(tmp_path / "one", tmp_path / "from_one")
    example_runs.train(tmp_path / "one", *COMMAND, "--epochs", "3", "--resume")
    from_one, _ = torchrun(tmp_path / "from_one", "--epochs", "3", "--resume")
    from_two = example_runs.train(tmp_path / "two", *COMMAND, "--epochs", "3", "--resume")
    assert_same_curves(example_runs.history(from_one), example_runs.history(one))
    assert_same_curves(example_runs.history(from_two), example_runs.history(one))


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_each_machine_says_once_what_is_wrong(
    local_rank: str,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "0", "RANK": "5", "LOCAL_RANK": local_rank}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with suppress(SystemExit):
        assert example_runs.main(["--epochs", "0"]) == 2
    assert capsys.readouterr().err.count("epochs must be a whole number") == lines
