"""The studies: what they find on the digits, what they refuse, and their command lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import example_runs
import pytest
import run_all  # type: ignore[import-not-found]  # beside the trainer
import torch
from dlops_examples import data, grad_cam, imbalance, networks, recipes
from dlops_examples.errors import UsageError
from dlops_examples.studies import (
    batch_norm,
    depth_width,
    dropout,
    feature_maps,
    limits,
    long_tail,
    study,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dlops

pytestmark = pytest.mark.example

SCRIPTS = [name for name in run_all.STUDIES if name != "exercises"]  # that one has its own tests


def results(module: ModuleType, out: Path, *arguments: str) -> dict[str, Any]:
    """What the study writes into results.json, run on one thread."""
    assert module.main([*arguments, "--threads", "1", "--out", str(out)]) == 0
    name = module.__name__.rpartition(".")[2]
    return json.loads((out / name / "results.json").read_text())


def test_long_tail_effect(tmp_path: Path) -> None:
    """On noisy digits a larger beta helps the tail, at the head's cost; means of three seeds."""
    losses = ["--losses", "ce", "softmax", "--betas", "0.9", "0.999"]
    found = results(long_tail, tmp_path, *losses)
    assert found["counts"] == [140, 91, 59, 38, 25, 16, 10, 7, 4, 3]
    accuracies = torch.tensor(list(found["accuracies"].values()))  # loss, seed, class
    assert accuracies.shape == (3, 3, 10)
    head, tail = accuracies[:, :, :3].mean((1, 2)), accuracies[:, :, -3:].mean((1, 2))
    assert tail[0] + 0.05 < tail[1] < tail[2] - 0.05
    assert tail[2] > tail[0] + 0.2
    assert head[2] < head[0] - 0.05
    assert head[0] > 0.8
    table = (tmp_path / "long_tail" / "results.md").read_text()
    spread = accuracies[0, :, -3:].mean(1).std()
    assert f" {tail[0]:.3f} ± {spread:.3f} " in table
    assert "| CB softmax β=0.999 |" in table


def test_class_counts() -> None:
    cifar10 = [5000, 2997, 1797, 1077, 646, 387, 232, 139, 83, 50]
    assert imbalance.class_counts(5000, 1 / 100, 10) == cifar10
    assert imbalance.class_counts(7, 1, 3) == [7, 7, 7]
    assert imbalance.class_counts(2, 1e-3, 2) == [2, 1]


def test_subsample() -> None:
    labels = torch.arange(3).repeat(20)
    split = TensorDataset(torch.arange(60.0), labels)
    chosen, kept = imbalance.subsample(split, [9, 4, 1], seed=0).tensors
    assert kept.bincount().tolist() == [9, 4, 1]
    assert len(set(chosen.tolist())) == 14
    assert torch.equal(labels[chosen.long()], kept)
    assert not torch.equal(chosen, imbalance.subsample(split, [9, 4, 1], seed=1).tensors[0])
    with pytest.raises(UsageError, match="class 1 has 20 training samples, not 21"):
        imbalance.subsample(split, [1, 21, 1], seed=0)


def test_fixed_noise() -> None:
    split = TensorDataset(torch.zeros(100, 1, 8, 8), torch.arange(100))
    noisy = imbalance.with_noise(split, 1.5)
    assert noisy.tensors[0].std().item() == pytest.approx(1.5, rel=0.05)
    assert torch.equal(noisy.tensors[0], imbalance.with_noise(split, 1.5).tensors[0])
    assert torch.equal(noisy.tensors[1], split.tensors[1])


def test_every_class_balanced_loss_is_dlops(tmp_path: Path, monkeypatch: Any) -> None:
    """With its form and beta, from the counts of the thinned out classes."""
    built: list[tuple[list[int], str, float, float]] = []
    original = dlops.nn.ClassBalancedFocalLoss.__init__

    def noting(self: Any, counts: list[int], beta: float, gamma: float, **others: Any) -> None:
        built.append((counts, others["form"], beta, gamma))
        original(self, counts, beta, gamma, **others)

    monkeypatch.setattr(
        dlops.nn.ClassBalancedFocalLoss,
        "__init__",
        lambda self, counts, **others: noting(self, counts, **others),
    )
    quick = ["--epochs", "1", "--seeds", "1", "--head", "20", "--factor", "0.1"]
    losses = ["--losses", "sigmoid", "softmax", "--betas", "0.9", "--gamma", "2"]
    found = results(long_tail, tmp_path, *quick, *losses, "--sigma", "0")
    counts = found["counts"]
    assert counts[0], counts[-1] == (20, 2)
    assert built == [(counts, form, 0.9, 2.0) for form in ("softmax", "sigmoid")]


def test_batch_norm_bears_a_rate_that_is_too_high_without(tmp_path: Path) -> None:
    quick = ["--limit", "480", "--epochs", "3", "--set", "network.widths=[8, 16]"]
    found = results(batch_norm, tmp_path, *quick, "--lr", "0.05", "--factors", "1")
    (_, normalised), (_, plain) = sorted(found["runs"].items())
    assert normalised[-1]["train_accuracy"] > 0.5
    assert plain[-1]["train_accuracy"] < 0.2
    rows = (tmp_path / "batch_norm" / "results.md").read_text()
    expected = f"{normalised[-1]['test_accuracy']:.4f} |       {plain[-1]['test_accuracy']:.4f} |"
    assert f"| 0.05 (x1)       |    {expected}" in rows


def test_dropout_of_everything(tmp_path: Path) -> None:
    """p = 1 trains the last bias alone: the loss of guessing, chance accuracy and no NaN."""
    quick = ["--limit", "128", "--epochs", "2", "--sweep-epochs", "1", "--seeds", "1"]
    runs = results(dropout, tmp_path, *quick, "--points", "3")["runs"]
    assert list(runs)[:3] == [f"p {p}, seed 0" for p in ("0.000", "0.500", "1.000")]
    (nothing,) = runs["p 1.000, seed 0"]
    assert 2.2 < nothing["train_loss"] < 2.4  # ln 10
    assert nothing["test_accuracy"] < 0.3
    assert len(runs[list(runs)[3]]) == 2  # the full run


@pytest.mark.parametrize(
    ("units", "budget", "layers", "problem"),
    [
        ((100,), 100, 1, None),
        ((120, 80), 200, 2, None),
        ((101,), 100, 1, "[101] are 101 hidden units, the budget is 100"),
        ((200,), 200, 2, "a budget of 200 asks for 2 hidden layers, got 1"),
        ((1, 0), 200, 2, "every hidden layer needs a unit, got [1, 0]"),
    ],
)
def test_unit_budget(units: Any, budget: int, layers: int, problem: str | None) -> None:
    if problem is None:
        limits.check_budget(units, budget, layers)
        return
    with pytest.raises(UsageError) as refused:
        limits.check_budget(units, budget, layers)
    assert str(refused.value) == problem


def test_equal_layers_keep_their_budget() -> None:
    for budget, known in depth_width.BUDGETS.items():
        for units in depth_width.equal_layers(budget):
            limits.check_budget(units, budget, known.layers)
            assert sum(units) > budget - len(units)


def test_parameter_cap() -> None:
    build = lambda **arguments: networks.build("mnist_cnn", 1, 28, 10, **arguments)  # noqa: E731
    limits.check_mnist_cnn(build())
    with pytest.raises(UsageError, match=r"1,\d{3},\d{3} parameters, the cap is 1,000,000"):
        limits.check_mnist_cnn(build(widths=[64, 128]))
    for kind in (nn.Dropout, nn.BatchNorm2d):
        kept = [layer for layer in build() if not isinstance(layer, kind)]
        with pytest.raises(UsageError, match=f"the network has no {kind.__name__}"):
            limits.check_mnist_cnn(nn.Sequential(*kept))


REFUSED: list[tuple[ModuleType, list[str], str]] = [
    (depth_width, ["--network", "100:60,50"], "[60, 50] are 110 hidden units"),
    (depth_width, ["--network", "200:100"], "asks for 2 hidden layers, got 1"),
    (depth_width, ["--network", "100"], "expected BUDGET:UNITS,..., such as 200:120,80, got '100'"),
    (depth_width, ["--budgets", "2"], "at least 4 hidden units, got 2"),
    (dropout, ["--set", "network.widths=[64, 512]"], "the cap is 1,000,000"),
    (dropout, ["--points", "1"], "--points must be at least 2"),
    (dropout, ["--set", "network.dropout=0.1"], "the study itself varies that"),
    (batch_norm, ["--lr", "0"], "--lr and --factors must be positive"),
    (long_tail, ["--factor", "0"], "--factor is the last class over the first, in (0, 1], got 0"),
    (long_tail, ["--head", "500"], "class 0 has 142 training samples, not 500"),
    (long_tail, ["--sigma", "-1"], "--sigma must not be negative, got -1"),
    (long_tail, ["--losses", "softmax", "--betas", "1"], "beta"),
    (long_tail, ["--limit", "8"], "--limit leaves a class without a test image"),
    (long_tail, ["--data", "cifar10", "--root", "nowhere"], "--download"),
    (feature_maps, ["--checkpoint", "none.pt"], "no checkpoint none.pt"),
    (feature_maps, ["--images", "1"], "--images must be at least 2, got 1"),
]


@pytest.mark.parametrize(("module", "arguments", "message"), REFUSED)
def test_refusals(
    module: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, before anything is trained."""
    with pytest.raises(SystemExit) as stop:
        module.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_resumed_study_keeps_finished_runs(tmp_path: Path) -> None:
    arguments = ["--limit", "64", "--epochs", "1", "--budgets", "100"]
    first = results(depth_width, tmp_path, *arguments)
    again = results(depth_width, tmp_path, *arguments, "--resume")
    assert again["runs"] == first["runs"]  # to the second that they took
    assert len(first["runs"]) == 4
    assert first["machine"]["dlops"] == dlops.__version__


def test_interrupted_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study.Study, "fit", interrupt)
    assert depth_width.main(["--limit", "64", "--out", str(tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err


def small_network() -> nn.Sequential:
    """An in-place ReLU follows the first convolution, whose maps must be kept all the same."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.Flatten(),
        nn.Linear(27, 5),
    )
    return dlops.convert(network.double())


def test_weights_are_the_scores_derivatives() -> None:
    """Moving a whole map by a little moves the score by the summed, not the averaged, gradient."""
    network, step = small_network(), 1e-6
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    maps, predicted = grad_cam.layer_maps(network, images, ["0", "3"])
    for name, channel in (("0", 2), ("3", 1)):

        def moved(module: nn.Module, inputs: Any, output: Tensor, channel: int = channel) -> Tensor:
            output = output.clone()
            output[:, channel] += step
            return output

        before = network(images)
        handle = network.get_submodule(name).register_forward_hook(moved)
        change = (network(images) - before).gather(1, predicted.unsqueeze(1)).squeeze(1) / step
        handle.remove()
        pixels = maps[name].activation[0, 0].numel()
        torch.testing.assert_close(
            maps[name].weight[:, channel] * pixels, change, rtol=1e-5, atol=1e-7
        )
    assert (maps["0"].activation < 0).any()
    assert torch.equal(maps["0"].activation, network[0](images))


def test_heat_map_is_of_one_channel() -> None:
    activation = torch.zeros(2, 3, 4, 4)
    activation[1, 2, :2] = torch.tensor([[1.0], [-1.0]])
    activation[1, 0] = 100.0  # another channel, which must not show
    weight = torch.tensor([[0.1, 0.5, 0.0], [0.2, 0.0, 0.3]])
    maps = grad_cam.LayerMaps(activation, weight)
    expected = torch.zeros(4, 4)
    expected[0] = 0.3
    assert torch.equal(maps.heat_map(1, 2, (4, 4)), expected)
    assert maps.heat_map(1, 2, (8, 8)).shape == (8, 8)
    assert maps.top_channels(2) == [1, 2]
    assert maps.top_images(0, 2) == [1, 0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [(["9"], "no layer 9; convolutions: 0, 3"), (["5"], "no feature maps: its output is")],
)
def test_layers_without_maps(layers: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grad_cam.layer_maps(small_network(), torch.rand(2, 1, 12, 12).double(), layers)


@pytest.mark.parametrize("name", run_all.RECIPES)
def test_maps_of_every_network(name: str) -> None:
    recipe = recipes.load(name)
    images = data.load(**recipe.data).test.tensors[0][:2]
    network = dlops.convert(
        networks.build(channels=images.shape[1], size=images.shape[2], classes=10, **recipe.network)
    )
    layers = grad_cam.spread(grad_cam.convolutions(network), 3)
    assert len(layers) == (1 if name in ("scratch", "vanilla") else 3)
    maps, predicted = grad_cam.layer_maps(network, images, layers)
    assert predicted.shape == (2,)
    for found in maps.values():
        assert found.weight.shape == found.activation.shape[:2]
        assert found.weight.any()


def test_maps_of_a_checkpoint(tmp_path: Path) -> None:
    quick = ["--limit", "64", "--epochs", "1"]
    trained = example_runs.train(tmp_path, "--recipe", "vanilla", *quick)
    options = ["--checkpoint", str(trained / "best.pt"), "--layers", "0", "--channels", "5", "3"]
    results(feature_maps, tmp_path, *options, "--images", "20")
    folder = tmp_path / "feature_maps"
    rows = (folder / "results.md").read_text().splitlines()[2:]
    assert [row.split("|")[3].strip() for row in rows] == ["5", "3"]
    assert [path.name for path in folder.glob("*.png")] == ["layer1.png"]
    with pytest.raises(SystemExit):
        feature_maps.main([*options[:2], "--channels", "32", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    """Through its command line: a table for each that it writes, and a picture."""
    script = str(example_runs.EXAMPLES / f"{name}.py")
    command = [sys.executable, script, *run_all.STUDIES[name], "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars without a terminal, and no warnings
    folder = tmp_path / name
    result = json.loads((folder / "results.json").read_text())
    assert result["study"] == name
    assert result["seconds"] > 0
    for run in result["runs"].values():
        assert run[-1]["test_accuracy"] <= 1
    assert done.stdout.count("\n---") == (folder / "results.md").read_text().count("\n|--")
    assert list(folder.glob("*.png"))
    assert done.stdout.splitlines()[-1].startswith(f"written to {folder}: ")
