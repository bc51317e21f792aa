"""The examples' recipes, networks and losses: what they hold, and the same on dlops and torch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import example_runs  # noqa: F401  (puts the examples on the path)
import pytest
import torch
from dlops_examples import impl, networks, recipes
from dlops_examples.errors import UsageError
from torch import Tensor, nn

import dlops

pytestmark = pytest.mark.example

CPU = torch.device("cpu")

# Parameters of the published network, by hand: weights, biases, batch norm's scale and shift.
DEEP_BN = [32, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
TWO_BLOCK = [(5, 3, 32), (3, 32, 64), (5, 64, 128), (3, 128, 256)]
LENET_ALEXNET = [(9 * 3, 64), (9 * 64, 128), (9 * 128, 256), (256, 64)]
LENET_ALEXNET += [(1024, 384), (384, 192), (192, 10)]
PUBLISHED = {
    "scratch": (5**2 * 3 + 1) * 32 + (8192 + 1) * 10,
    "vanilla": (7**2 * 3 + 1) * 32 + (5408 + 1) * 10,
    "lenet_alexnet": sum((inputs + 1) * outputs for inputs, outputs in LENET_ALEXNET),
    "deep_bn": (7**2 * 3 + 1) * 32
    + sum((9 * inputs + 2) * outputs for inputs, outputs in pairwise(DEEP_BN))
    + (1024 + 1) * 10,
    "two_block": sum((kernel**2 * inputs + 2) * outputs for kernel, inputs, outputs in TWO_BLOCK)
    + (256 * 8**2 + 1) * 10,
    "resnet32": 464_154,
}


def real(name: str) -> recipes.Recipe:
    data = "mnist" if name in ("mnist_cnn", "digits_cnn") else "cifar10"
    return recipes.load(name, {"data.name": data})


def build(recipe: recipes.Recipe) -> nn.Module:
    torch.manual_seed(0)
    channels, size = recipe.data["channels"], recipe.data["size"]
    return networks.build(channels=channels, size=size, classes=10, **recipe.network)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_of_the_published_networks(name: str, count: int) -> None:
    assert networks.parameter_count(build(real(name))) == count


def test_mnist_cnn_keeps_to_its_rules() -> None:
    model = build(real("mnist_cnn"))
    kinds = {type(module) for module in model.modules()}
    assert networks.parameter_count(model) < 1_000_000
    assert {nn.BatchNorm2d, nn.Dropout} <= kinds


def test_adam_cnn_with_batch_norm_after_every_convolution() -> None:
    kinds = [type(layer) for layer in build(recipes.load("adam_cnn", {"network.batch_norm": True}))]
    after = {b for a, b in pairwise(kinds) if a is nn.Conv2d}
    assert after == {nn.BatchNorm2d}
    assert nn.BatchNorm2d not in {type(layer) for layer in build(recipes.load("adam_cnn"))}


@pytest.mark.parametrize("name", recipes.names())
def test_both_implementations_compute_the_same(name: str) -> None:
    """Logits and gradients of the recipe's network in double precision."""
    recipe = recipes.load(name)
    shape = (4, recipe.data["channels"], recipe.data["size"], recipe.data["size"])
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for implementation in impl.IMPLS:
        model = impl.place(build(recipe), implementation).double()
        torch.manual_seed(2)  # dropout
        logits = model(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), model.parameters())])
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native)


def test_layer_table() -> None:
    """Every layer with parameters is in it, with its output; the model is as it was before."""
    model = build(recipes.load("scratch"))
    model.train()
    table = networks.layer_table(model, torch.zeros(1, 3, 32, 32)).splitlines()
    rows = [line.split() for line in table]
    assert rows == [
        ["layer", "kind", "output", "parameters"],
        ["0", "Conv2d", "32x32x32", "2,432"],
        ["2", "MaxPool2d", "32x16x16", "0"],
        ["3", "Flatten", "8192", "0"],
        ["4", "Linear", "10", "81,930"],
    ]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    resnet = build(recipes.load("resnet32"))
    statistics = {name: value.clone() for name, value in resnet.named_buffers()}
    table = networks.layer_table(resnet, torch.zeros(1, 3, 32, 32)).splitlines()
    assert sum("Conv2d" in line for line in table) == 31
    assert all(torch.equal(value, statistics[name]) for name, value in resnet.named_buffers())


@pytest.mark.parametrize("name", impl.TAKES)
def test_losses_of_both_implementations_agree(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(4, (32,), generator=generator)
    given = {"gamma": 1.5, "beta": 0.99, "alpha": 0.3}
    arguments = {key: value for key, value in given.items() if key in impl.TAKES[name]}
    results = []
    for implementation in impl.IMPLS:
        loss = impl.build_loss(implementation, [100, 50, 10, 2], CPU, name, **arguments)
        losses = loss(logits, target)
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    assert results[0][0].shape == (32,)
    torch.testing.assert_close(*results, check_dtype=False, rtol=1e-6, atol=1e-8)


def test_class_balanced_losses_weight_the_classes() -> None:
    """A class's weight relative to another's is the inverse ratio of their effective numbers."""
    logits, target = torch.zeros(2, 2), torch.tensor([0, 1])
    for implementation in impl.IMPLS:
        arguments = ("class_balanced_softmax",)
        loss = impl.build_loss(implementation, [100, 10], CPU, *arguments, beta=0.9, gamma=1.0)
        head, tail = loss(logits, target).tolist()
        assert tail / head == pytest.approx((1 - 0.9**100) / (1 - 0.9**10), rel=1e-5)


def test_dlops_leaves_no_native_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = impl.place(networks.build("mnist_cnn", channels=1, size=28, classes=10), "dlops")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(dlops.nn.Conv2d) == 4
    assert kinds.count(dlops.nn.MaxPool2d) == 2
    monkeypatch.setattr(dlops, "convert", lambda module: module)
    with pytest.raises(AssertionError, match=r"torch\.nn layers: 0"):
        impl.place(nn.Sequential(nn.Conv2d(1, 1, 1)), "dlops")


def test_overrides() -> None:
    recipe = recipes.load("digits_cnn", {"loss.name": "cross_entropy", "optimizer.lr": 0.1})
    assert recipe.loss == {"name": "cross_entropy"}  # gamma belonged to the focal loss
    assert recipe.optimizer == {"name": "Adam", "lr": 0.1}
    balanced = {"loss.beta": 0.9, "loss.name": "class_balanced_softmax"}
    assert recipes.load("digits_cnn", balanced).loss == {"name": balanced["loss.name"], "beta": 0.9}
    assert recipes.parse_override("network.widths=[8, 16]") == ("network.widths", [8, 16])
    assert recipes.parse_override("network.name=mnist_cnn") == ("network.name", "mnist_cnn")


def test_real_data_brings_the_published_schedule() -> None:
    """[real] is applied where the data is not the digits, before what the command line says."""
    recipe = recipes.load("lenet_alexnet", {"data.name": "cifar10", "epochs": 3})
    assert recipe.data == {"name": "cifar10", "size": 32, "channels": 3}
    assert (recipe.epochs, recipe.batch_size) == (3, 128)
    assert recipe.optimizer["lr"] == 0.05
    assert recipe.schedule == {"name": "MultiStepLR", "milestones": [42, 56]}
    assert recipes.load("lenet_alexnet").schedule["milestones"] != [42, 56]
    augment = recipes.load("resnet32", {"data.name": "cifar10"}).augment
    assert [step["name"] for step in augment] == ["RandomCrop", "RandomHorizontalFlip"]
    exponential = recipes.load("adam_cnn", {"data.name": "cifar10"}).schedule
    assert exponential == {"name": "ExponentialLR", "gamma": 0.99844}


def test_recipe_file(tmp_path: Path) -> None:
    text = (recipes.FOLDER / "digits_cnn.toml").read_text()
    path = tmp_path / "mine.toml"

    def load(content: str) -> dict[str, Any]:
        path.write_text(content)
        return recipes.load(str(path), {"data.name": "mnist"}).as_dict()

    assert load(text) == real("digits_cnn").as_dict() | {"name": "mine"}
    assert load(text + "\n[real]\nepochs = 99\n")["epochs"] == 99
    with pytest.raises(UsageError, match="unknown epoch; known: augment, batch_size, data"):
        load("epoch = 3\n" + text)
    with pytest.raises(UsageError, match=r"\[real\] must be a table"):
        load("real = 3\n" + text)
