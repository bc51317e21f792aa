"""dlops.nn beside torch.nn, and dlops.convert and revert."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import OpRecorder, check_runs_ours, normal, values_and_gradients
from torch import Tensor, nn

import dlops
import dlops.functional as F
import dlops.nn as dnn

pytestmark = pytest.mark.module
parametrize = pytest.mark.parametrize

# name, constructor arguments, size of the input
LAYERS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (2, 4, 7, 6)),
    (
        "Conv2d",
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (1, 2),
            "padding": (1, 0),
            "dilation": (2, 1),
            "groups": 2,
            "bias": False,
        },
        (2, 4, 7, 6),
    ),
    *(
        (
            "Conv2d",
            {
                "in_channels": 3,
                "out_channels": 2,
                "kernel_size": (3, 2),
                "padding": padding,
                "padding_mode": mode,
            },
            (2, 3, 6, 5),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in ((2, 1), "same")
    ),
    ("MaxPool2d", {"kernel_size": 2}, (2, 3, 6, 5)),
    (
        "MaxPool2d",
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True},
        (3, 9, 8),
    ),
    ("Unfold", {"kernel_size": (3, 2), "dilation": 2, "padding": 1, "stride": 2}, (2, 3, 7, 6)),
    ("Fold", {"output_size": (5, 6), "kernel_size": (2, 3), "padding": (0, 1)}, (2, 12, 24)),
]
layers = parametrize(
    "name, arguments, size", LAYERS, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(LAYERS)]
)


def pair(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's, in float64, each from the same seed."""
    modules = []
    for source in (dnn, nn):
        torch.manual_seed(0)
        modules.append(getattr(source, name)(**arguments).double())
    return modules[0], modules[1]


def with_parameter_gradients(module: nn.Module, input: Tensor) -> dict[str, Tensor]:
    results = values_and_gradients(module, [input])
    module.zero_grad()
    module(input.requires_grad_()).square().sum().backward()
    return results | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@layers
def test_same_values_and_gradients(
    name: str, arguments: dict[str, Any], size: tuple[int, ...]
) -> None:
    ours, theirs = (with_parameter_gradients(m, normal(size)) for m in pair(name, arguments))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@layers
def test_runs_our_kernels(name: str, arguments: dict[str, Any], size: tuple[int, ...]) -> None:
    op = {"Conv2d": "conv2d", "MaxPool2d": "max_pool2d", "Unfold": "unfold", "Fold": "fold"}[name]
    check_runs_ours(pair(name, arguments)[0], [normal(size)], op)


@layers
def test_same_state_and_repr(name: str, arguments: dict[str, Any], size: tuple[int, ...]) -> None:
    """The same seed gives the same parameters, so that both sides train alike."""
    ours, theirs = pair(name, arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert repr(ours) == repr(theirs)


@parametrize("name", ["Conv2d", "MaxPool2d", "Unfold", "Fold"])
def test_same_constructor(name: str) -> None:
    ours = inspect.signature(getattr(dnn, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_return_indices() -> None:
    ours, theirs = (m.MaxPool2d(2, return_indices=True) for m in (dnn, nn))
    input = normal((2, 3, 6, 5))
    for one, other in zip(ours(input), theirs(input), strict=True):
        assert torch.equal(one, other)


@layers
def test_copies(name: str, arguments: dict[str, Any], size: tuple[int, ...]) -> None:
    module = pair(name, arguments)[0]
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    )
    for twin in copies:
        assert type(twin) is type(module)
        assert torch.equal(twin(normal(size)), module(normal(size)))


# ---------------------------------------------------------------------------------------------
# state_dict


class Net(nn.Module):
    """A small CNN from either side's layers."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.stem = layers.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = layers.MaxPool2d(2)
        self.blocks = nn.ModuleList(
            nn.Sequential(layers.Conv2d(8, 8, 3, padding="same", groups=2), nn.ReLU())
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


IMAGES = normal((4, 3, 10, 9))


@parametrize("source, target", [(nn, dnn), (dnn, nn)], ids=["to_dlops", "to_torch"])
def test_state_dict_both_ways(source: Any, target: Any) -> None:
    giver, taker = Net(source).double(), Net(target).double()
    assert list(giver.state_dict()) == list(taker.state_dict())
    stream = io.BytesIO()
    torch.save(giver.state_dict(), stream)
    stream.seek(0)
    result = taker.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    torch.testing.assert_close(giver(IMAGES), taker(IMAGES), rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# The losses


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
LOSSES: list[tuple[str, Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = [
    ("SigmoidFocalLoss", dnn.SigmoidFocalLoss, lambda x, t: F.sigmoid_focal_loss(x, one_hot(t))),
    (
        "SigmoidFocalLoss_arguments",
        lambda: dnn.SigmoidFocalLoss(alpha=-1, gamma=1.5, reduction="sum"),
        lambda x, t: F.sigmoid_focal_loss(x, one_hot(t), -1, 1.5, "sum"),
    ),
    ("FocalLoss", dnn.FocalLoss, F.focal_loss),
    (
        "FocalLoss_arguments",
        lambda: dnn.FocalLoss(WEIGHT, 0.5, 1, "sum", 0.1),
        lambda x, t: F.focal_loss(x, t, WEIGHT, 0.5, 1, "sum", 0.1),
    ),
    (
        "ClassBalancedFocalLoss",
        lambda: dnn.ClassBalancedFocalLoss([9, 4, 1, 100]),
        lambda x, t: F.focal_loss(x, t, balanced(0.9999)),
    ),
    (
        "ClassBalancedFocalLoss_arguments",
        lambda: dnn.ClassBalancedFocalLoss(
            torch.tensor([9, 4, 1, 100]), beta=0.9, gamma=1.0, reduction="none"
        ),
        lambda x, t: F.focal_loss(x, t, balanced(0.9), 1.0, reduction="none"),
    ),
    *(
        (
            f"ClassBalancedFocalLoss_sigmoid_{reduction}",
            lambda reduction=reduction: dnn.ClassBalancedFocalLoss(
                [9, 4, 1, 100], beta=0.99, form="sigmoid", reduction=reduction
            ),
            lambda x, t, reduction=reduction: paper_form(x, t, 0.99, reduction),
        )
        for reduction in ("none", "mean", "sum")
    ),
]


def one_hot(target: Tensor) -> Tensor:
    return nn.functional.one_hot(target, 4).double()


def balanced(beta: float) -> Tensor:
    return F.class_balanced_weight([9, 4, 1, 100], beta).double()


def paper_form(input: Tensor, target: Tensor, beta: float, reduction: str) -> Tensor:
    """Sigmoid focal terms without alpha, summed over classes, times the label's weight."""
    terms = F.sigmoid_focal_loss(input, one_hot(target), alpha=-1, gamma=2.0)
    losses = terms.sum(1) * balanced(beta)[target]
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


@parametrize("name, build, expected", LOSSES, ids=[name for name, *_ in LOSSES])
def test_losses(name: str, build: Any, expected: Any) -> None:
    input, target = normal((6, 4)), torch.tensor([0, 1, 2, 3, 2, 1])
    module = build()
    if not name.startswith("Sigmoid"):
        module = module.double()

    def call(x: Tensor) -> Tensor:
        return module(x, one_hot(target) if name.startswith("Sigmoid") else target)

    ours = values_and_gradients(call, [input])
    truth = values_and_gradients(lambda x: expected(x, target), [input])
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


def test_class_weights_follow_the_module() -> None:
    """As in torch.nn.CrossEntropyLoss, `weight` is a buffer: it is cast, moved and saved."""
    losses: list[Any] = [dnn.FocalLoss(WEIGHT), dnn.ClassBalancedFocalLoss([9, 4, 1, 100])]
    for module in losses:
        assert "weight" in module.state_dict()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert module.to(dtype).weight.dtype == dtype
            module(normal((6, 4)).to(dtype), torch.tensor([0, 1, 2, 3, 2, 1]))


def test_gamma_0_is_cross_entropy_loss() -> None:
    input, target = normal((6, 4)), torch.tensor([0, 1, 2, -100, 2, 1])
    ours = dnn.FocalLoss(WEIGHT, gamma=0.0, label_smoothing=0.1)
    theirs = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)
    torch.testing.assert_close(ours(input, target), theirs(input, target))


@parametrize("build", [dnn.SigmoidFocalLoss, dnn.FocalLoss], ids=lambda build: build.__name__)
def test_loss_refuses_an_unknown_reduction(build: Any) -> None:
    with pytest.raises(ValueError, match=r"reduction.*'average'"):
        build(reduction="average")(normal((2, 3)), normal((2, 3)).abs())


def test_class_balanced_loss_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match=r"form.*'logistic'"):
        dnn.ClassBalancedFocalLoss([1, 2], form="logistic")


# ---------------------------------------------------------------------------------------------
# convert and revert


class MyConv2d(nn.Conv2d):
    """A user's own layer: it may compute anything, so it is not touched."""


def ops_of(model: nn.Module) -> set[str]:
    with OpRecorder() as recorder:
        model(IMAGES).sum().backward()
    return recorder.names


def test_convert_and_revert() -> None:
    model = Net(nn).double().eval()
    parameters, names = list(model.parameters()), list(model.state_dict())
    layers = list(model.modules())
    before = with_parameter_gradients(model, IMAGES)

    assert dlops.convert(model) is model
    assert {type(m) for m in model.modules()} & {nn.Conv2d, nn.MaxPool2d} == set()
    assert sum(type(m) in (dnn.Conv2d, dnn.MaxPool2d) for m in model.modules()) == 4
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(
        with_parameter_gradients(model, IMAGES), before, rtol=1e-10, atol=1e-12
    )
    used = ops_of(model)
    assert {"dlops::conv2d"} <= used
    assert not any("aten::convolution" in name or "aten::max_pool2d" in name for name in used)

    assert dlops.revert(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in Net(nn).modules()]
    assert len(list(model.modules())) == len(layers)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not any(name.startswith("dlops::") for name in ops_of(model))


@parametrize("layer", [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)], ids=["Conv2d", "MaxPool2d"])
def test_convert_a_single_layer(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    converted = dlops.convert(layer)
    assert type(converted) is getattr(dnn, type(converted).__name__)
    assert type(dlops.revert(converted)) is getattr(nn, type(converted).__name__)


def test_subclasses_are_left_alone() -> None:
    model = nn.Sequential(MyConv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match=r"as they are.*: 0 \(test_modules.MyConv2d\)$"):
        dlops.convert(model)
    assert [type(layer) for layer in model] == [MyConv2d, dnn.Conv2d]
    dlops.revert(model)
    assert [type(layer) for layer in model] == [MyConv2d, nn.Conv2d]


def test_many_subclasses_are_one_short_warning() -> None:
    model = nn.Sequential(*(MyConv2d(3, 3, 1) for _ in range(9)))
    with pytest.warns(UserWarning, match="and 4 more$") as caught:
        dlops.convert(model)
    assert len(caught) == 1


def test_lazy_layers_become_ours() -> None:
    torch.manual_seed(0)
    native = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()).double()
    ours = dlops.convert(copy.deepcopy(native))
    assert isinstance(ours, nn.Sequential)
    assert type(ours[0]) is dnn.LazyConv2d
    assert type(dlops.revert(copy.deepcopy(ours))[0]) is nn.LazyConv2d
    results = []
    for model in (native, ours):
        torch.manual_seed(1)
        results.append(model(IMAGES))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert type(ours[0]) is dnn.Conv2d
    assert ours[0].in_channels == IMAGES.shape[1]


def test_a_shared_layer_stays_shared() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = dlops.convert(nn.Sequential(conv, nn.ReLU(), conv))
    assert isinstance(model, nn.Sequential)
    assert model[0] is model[2]
    assert type(model[0]) is dnn.Conv2d


def test_converting_twice_is_converting_once() -> None:
    model = dlops.convert(Net(nn))
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in dlops.convert(model).modules()] == types


def test_an_optimizer_goes_on_working() -> None:
    model = Net(nn).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dlops.convert(model)
    before = model.stem.weight.clone()
    model(IMAGES).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, before)


def test_hooks_and_settings_survive() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].weight.requires_grad_(False)
    dlops.convert(model)
    model(IMAGES.float())
    assert calls == [1]
    assert not model[0].weight.requires_grad
