"""The worked exercises: every printed result is the expected one, and the code holds beyond it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

from dlops_examples.exercises import EXERCISES, convolution, regression, relu  # noqa: E402
from dlops_examples.studies import exercises  # noqa: E402

import dlops.functional as F  # noqa: E402

pytestmark = pytest.mark.example

CHECKS = {"1": 11, "2": 3, "3": 3, "4": 8, "5": 5, "6": 8, "7": 2}


@pytest.mark.parametrize("title", EXERCISES)
def test_results_are_the_expected_ones(title: str) -> None:
    checks = EXERCISES[title]()
    assert len(checks) == CHECKS[title[0]]
    assert [check for check in checks if not check.holds] == []


def test_matrix_of_the_worked_geometry() -> None:
    """The expected entries of A, by their place: row y, column of the one pixel it reads."""
    weight = torch.tensor([[0.0, 0.1, 0.2], [1.0, 1.1, 1.2], [2.0, 2.1, 2.2]]).view(1, 1, 3, 3)
    expected = torch.zeros(4, 9)
    for row, (pixel, entry) in enumerate(zip((0, 2, 6, 8), (2.2, 2.0, 0.2, 0.0), strict=True)):
        expected[row, pixel] = entry
    assert torch.equal(convolution.convolution_matrix(weight, (3, 3), 4, 2), expected)


@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((1, 5, 5), (1, 1, 3, 3), {}),
        ((3, 6, 7), (2, 3, 3, 2), {"stride": (2, 3), "padding": (2, 1)}),
        ((2, 9, 8), (4, 2, 2, 3), {"dilation": (3, 2), "padding": 1}),
        ((4, 4, 4), (5, 4, 1, 1), {"stride": 2}),
        ((1, 3, 3), (1, 1, 3, 3), {"stride": 4, "padding": 2}),
    ],
)
def test_matrix_of_any_geometry(
    shape: tuple[int, int, int], kernel: tuple[int, ...], geometry: dict[str, int]
) -> None:
    """Small integers, so that the matrix and native convolution agree bit for bit."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-4, 5, shape, generator=generator).float()
    weight = torch.randint(-4, 5, kernel, generator=generator).float()
    matrix = convolution.convolution_matrix(weight, shape[1:], **geometry)
    expected = nn.functional.conv2d(image.unsqueeze(0), weight, **geometry)
    assert torch.equal(matrix @ image.flatten(), expected.flatten())


def test_average_pooling_is_a_convolution() -> None:
    images = torch.randint(0, 16, (5, 1, 8, 6), generator=torch.Generator().manual_seed(0)).float()
    expected = nn.functional.avg_pool2d(images, 2)
    assert torch.equal(convolution.average_pool2d(images, 2), expected)


@pytest.mark.parametrize("x", [-3.0, -0.5, 0.25, 5.0])
def test_local_map_holds_around_its_point(x: float) -> None:
    h, slope, offset = relu.linear_map(relu.three_layers, x)
    assert h == slope * x + offset
    near = x + 2**-10
    assert relu.three_layers(torch.tensor([near])).item() == pytest.approx(slope * near + offset)


def test_binary_cross_entropy_is_native() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(50, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (50,), generator=generator).double()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(relu.binary_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Sigmoid])
def test_zero_weights_keep_units_alike(kind: type[nn.Module]) -> None:
    """With ReLU no weight ever moves; with sigmoid they move, but all units together."""
    network = relu.trained_from_zero(kind(), relu.logical_or(relu.INPUTS))
    hidden, output = network[0], network[2]
    assert torch.equal(hidden.weight, hidden.weight[:1].expand_as(hidden.weight))
    assert torch.equal(output.weight, output.weight[:, :1].expand_as(output.weight))
    assert hidden.weight.any().item() == output.weight.any().item() == (kind is nn.Sigmoid)
    assert output.bias.any()  # the one parameter that ReLU's zero activations leave to learn


@pytest.mark.parametrize("seed", range(1, 4))
def test_sorted_examples_kill_units(seed: int) -> None:
    dead, right = relu.dead_units(shuffled=False, seed=seed)
    assert 4 <= dead < 64
    assert right < 0.7
    assert relu.dead_units(shuffled=True, seed=seed) == (0, pytest.approx(1.0, abs=0.02))


def test_hessian_formula() -> None:
    """By hand for one example: p = 1/2, so XᵀPX(1-P) is the outer product over four."""
    formula = regression.hessian_formula(torch.tensor([[2.0, -4.0]]), torch.zeros(2))
    assert formula.tolist() == [[1.0, -2.0], [-2.0, 4.0]]


def test_script(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "exercises.py"), "--out", str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1].startswith("all results are as expected; ")
    table = (tmp_path / "exercises" / "results.md").read_text()
    assert table.count(" yes |") == sum(CHECKS.values())
    assert [line for line in lines if line[:2] in {f"{n}." for n in CHECKS}] == list(EXERCISES)


def test_script_fails_on_a_wrong_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(F, "max_pool2d", lambda images, size: images[..., ::size, ::size] * 2)
    assert exercises.main(["--out", str(tmp_path)]) == 1
    assert "4 results are not as expected" in capsys.readouterr().out
