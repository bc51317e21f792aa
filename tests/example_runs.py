"""What the tests of the examples share."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside these tests", allow_module_level=True)
pytest.importorskip("sklearn", reason="the examples' data is scikit-learn's")
sys.path.insert(0, str(EXAMPLES))

from dlops_examples import files  # noqa: E402
from dlops_examples.cli import main  # noqa: E402


def train(out: Path, *arguments: str) -> Path:
    """Train on one thread with these options; the folder of the run."""
    options = dict(itertools.pairwise(arguments))
    assert main([*arguments, "--threads", "1", "--out", str(out)]) == 0
    return out / f"{options.get('--recipe', 'digits_cnn')}-{options.get('--impl', 'dlops')}"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the trainer refuses these options."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def weights(folder: Path) -> dict[str, Tensor]:
    return files.load_checkpoint(folder / "last.pt", torch.device("cpu"))["model"]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return metrics(folder)["history"]


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that do not have the same bits."""
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]
