"""The same bits, whatever surrounds a call: threads, neighbours in the batch, the kind of graph.

Repeated calls, and one against two threads, are in each op's own tests. CI runs all of them on
every CPU capability.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import Conv2dCase, MaxPool2dCase, UnfoldCase, ids
from checks import generator, normal, threads
from tolerances import DTYPES
from torch import Tensor, nn

import dlops
import dlops.functional as F

pytestmark = pytest.mark.determinism
parametrize = pytest.mark.parametrize

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH = 19
# Sizes of a batch, and where it starts in the whole one: 1 image, a few, whole vectors of them.
PARTS = [(1, 0), (1, 18), (2, 3), (3, 1), (7, 12), (8, 8), (16, 0), (16, 3), (18, 1)]


class Op(NamedTuple):
    """A function of a batch alone: what stands beside it is the same for every sample."""

    id: str
    input: tuple[int, ...]
    bind: Callable[[torch.dtype], Callable[[Tensor, slice], Tensor]]


def conv2d(
    name: str,
    size: tuple[int, ...],
    weight: tuple[int, int, int, int],
    *,
    weight_format: torch.memory_format = torch.contiguous_format,
    **more: Any,
) -> Op:
    case = Conv2dCase(name, (BATCH, *size), weight, **more)

    def bind(dtype: torch.dtype) -> Callable[[Tensor, slice], Tensor]:
        _, w, b = (x.to(dtype) for x in case.tensors())
        w = w.contiguous(memory_format=weight_format)
        return lambda x, _: F.conv2d(x, w, b, **case.arguments())

    return Op(f"conv2d_{name}", case.input, bind)


def pooling(case: MaxPool2dCase) -> Op:
    return Op(
        f"max_pool2d_{case.id}",
        case.input,
        lambda _: lambda x, _: F.max_pool2d(x, **case.arguments()),
    )


def columns(op: str, case: UnfoldCase) -> Op:
    if op == "unfold":
        return Op(
            f"unfold_{case.id}",
            case.input,
            lambda _: lambda x, _: F.unfold(x, **case.arguments()),
        )
    return Op(
        f"fold_{case.id}",
        tuple(case.columns().shape),
        lambda _: lambda x, _: F.fold(x, case.input[2:], **case.arguments()),
    )


def focal(name: str, size: tuple[int, ...], **more: Any) -> Op:
    target = torch.randint(size[1], (size[0], *size[2:]), generator=generator(2))
    loss = partial(F.focal_loss, reduction="none", **more)
    return Op(f"focal_loss_{name}", size, lambda _: lambda x, rows: loss(x, target[rows]))


def soft_focal(name: str, size: tuple[int, ...], **more: Any) -> Op:
    target = normal(size, 2).softmax(1)
    loss = partial(F.focal_loss, reduction="none", **more)
    return Op(
        f"focal_loss_{name}",
        size,
        lambda dtype: lambda x, rows: loss(x, target[rows].to(dtype)),
    )


def sigmoid_focal(name: str, size: tuple[int, ...], soft: bool = False) -> Op:
    target = torch.rand(size, generator=generator(2))
    target = target if soft else (target < 0.3).float()
    return Op(
        f"sigmoid_focal_loss_{name}",
        size,
        lambda dtype: lambda x, rows: F.sigmoid_focal_loss(x, target[rows].to(dtype), gamma=1.7),
    )


CONV2D = [
    conv2d("several_images_a_panel", (3, 5, 5), (4, 3, 3, 3), padding=1),
    conv2d("2x2_images", (64, 2, 2), (40, 64, 3, 3), padding=1),
    conv2d("winograd", (64, 9, 8), (64, 64, 3, 3), padding=1),
    conv2d("1x1_images", (70, 1, 1), (33, 70, 1, 1)),
    conv2d("few_pixels", (256, 5, 5), (256, 256, 3, 3), padding=1),
    conv2d(
        "few_pixels_channels_last_weight",
        (256, 5, 5),
        (256, 256, 3, 3),
        padding=1,
        weight_format=torch.channels_last,
    ),
    conv2d("few_pixels_strided", (256, 6, 5), (345, 256, 3, 2), stride=(2, 3), padding=1),
    conv2d("few_pixels_many_outputs", (96, 4, 3), (512, 96, 3, 3), stride=(2, 1), padding=1),
    conv2d("few_pixels_without_borders", (128, 6, 5), (256, 128, 3, 3)),
    conv2d(
        "few_pixels_without_borders_channels_last_weight",
        (128, 6, 5),
        (256, 128, 3, 3),
        weight_format=torch.channels_last,
    ),
    conv2d("few_pixels_one_kernel_row", (128, 2, 5), (512, 128, 2, 2), dilation=(1, 2)),
    conv2d("1x1", (24, 7, 7), (31, 24, 1, 1)),
    conv2d("1x1_stride", (24, 9, 7), (17, 24, 1, 1), stride=2),
    conv2d("deep", (160, 6, 5), (17, 160, 3, 3)),
    conv2d("grouped", (32, 7, 7), (48, 8, 3, 3), padding=1, groups=4),
    conv2d("thin_groups", (6, 8, 5), (12, 2, 3, 3), padding=1, groups=3),
    conv2d("depthwise", (17, 9, 11), (17, 1, 3, 3), padding=1, groups=17),
    conv2d("first_layer", (3, 30, 27), (20, 3, 5, 5), stride=2, padding=2),
    conv2d("first_layer_filled", (3, 30, 32), (20, 3, 5, 5), padding=2),
    conv2d("dilated", (9, 12, 10), (10, 9, 3, 3), padding=2, dilation=2),
]
IMAGES = [
    pooling(MaxPool2dCase("2x2", (BATCH, 5, 8, 9), 2)),
    pooling(MaxPool2dCase("3x3_overlapping", (BATCH, 17, 7, 6), 3, 1, 1)),
    pooling(MaxPool2dCase("cells_over_256", (BATCH, 2, 18, 18), 17)),
    columns("unfold", UnfoldCase("3x3", (BATCH, 3, 6, 5), 3, padding=1)),
]
OTHERS = [
    columns("fold", UnfoldCase("3x3", (BATCH, 3, 6, 5), 3, padding=1)),
    focal("10_classes", (BATCH, 10)),
    focal("37_classes_smoothing", (BATCH, 37), gamma=0.7, label_smoothing=0.2),
    focal("image", (BATCH, 5, 3, 7), gamma=3.3),
    soft_focal("probabilities", (BATCH, 21), gamma=1.5),
    sigmoid_focal("rows", (BATCH, 13)),
    sigmoid_focal("soft_rows", (BATCH, 13), soft=True),
]


def value_and_gradient(
    function: Callable[[Tensor, slice], Tensor], x: Tensor, rows: slice, grad_output: Tensor | None
) -> tuple[Tensor, Tensor]:
    leaf = x[rows].detach().requires_grad_()
    output = function(leaf, rows)
    grad = normal(output.shape, 9).to(output.dtype) if grad_output is None else grad_output[rows]
    return output.detach(), torch.autograd.grad(output, leaf, grad)[0]


def check_samples_do_not_see_each_other(op: Op, x: Tensor, dtype: torch.dtype) -> None:
    """Values and gradients of a part of the batch alone are those it has among the others."""
    function = op.bind(dtype)
    everything = slice(0, BATCH)
    output = function(x, everything)
    grad_output = normal(output.shape, 9).to(dtype)
    whole = value_and_gradient(function, x, everything, grad_output)
    for count, start in PARTS:
        rows = slice(start, start + count)
        part = value_and_gradient(function, x, rows, grad_output)
        for name, alone, among in zip(("value", "gradient"), part, whole, strict=True):
            assert torch.equal(alone, among[rows]), f"{name} of {count} samples from {start}"


@parametrize("layout", FORMATS)
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("op", [*CONV2D, *IMAGES], ids=ids)
def test_an_image_does_not_see_its_neighbours(op: Op, dtype: torch.dtype, layout: str) -> None:
    x = normal(op.input, 1).to(dtype).contiguous(memory_format=FORMATS[layout])
    check_samples_do_not_see_each_other(op, x, dtype)


@parametrize("layout", FORMATS)
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("op", CONV2D, ids=ids)
def test_the_switch_of_onednn_changes_nothing(op: Op, dtype: torch.dtype, layout: str) -> None:
    """Products are dlops' own."""
    x = normal(op.input, 1).to(dtype).contiguous(memory_format=FORMATS[layout])

    def results() -> tuple[Tensor, Tensor]:
        return value_and_gradient(op.bind(dtype), x, slice(0, BATCH), None)

    on = results()
    with torch.backends.mkldnn.flags(enabled=False):
        assert all(map(torch.equal, results(), on))


@parametrize("dtype", DTYPES, ids=ids)
@parametrize("op", OTHERS, ids=ids)
def test_a_row_does_not_see_its_neighbours(op: Op, dtype: torch.dtype) -> None:
    check_samples_do_not_see_each_other(op, normal(op.input, 1).to(dtype), dtype)


@parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@parametrize("layout", FORMATS)
@parametrize("neighbour", [float("nan"), float("inf"), 1e30])
def test_a_neighbour_that_is_not_finite_changes_nothing(
    neighbour: float, layout: str, dtype: torch.dtype
) -> None:
    for op in (*CONV2D[:5], *IMAGES):
        x = normal(op.input, 1).to(dtype).contiguous(memory_format=FORMATS[layout])
        function = op.bind(dtype)
        before = function(x, slice(0, BATCH))
        x[1::2] = neighbour
        assert torch.equal(function(x, slice(0, BATCH))[::2], before[::2]), op.id


# ---------------------------------------------------------------------------------------------
# A whole network: threads, kinds of graph


class Network(nn.Module):
    """Every op that a network has, the stages large enough for several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 5, padding=2)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.wide = nn.Conv2d(24, 70, 1)
        self.last = nn.Conv2d(70, 10, 3, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.loss = dlops.nn.FocalLoss(gamma=1.5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.pool(self.first(x).relu())
        x = self.pool(self.wide(self.depthwise(x)).relu())
        return self.loss(self.last(x).mean((2, 3)), target)


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=ids)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = dlops.convert(Network()).to(request.param)
    images = normal((6, 3, 40, 36), 1).to(request.param)
    return model, images, torch.arange(6)


def train_step(model: Any, images: Tensor, target: Tensor) -> list[Tensor]:
    """The loss, the gradient of the images and those of the parameters."""
    model.zero_grad()
    images = images.detach().requires_grad_()
    loss = model(images, target)
    loss.backward()
    return [loss.detach(), images.grad, *(p.grad.clone() for p in model.parameters())]


def check_equal(results: list[Tensor], others: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(results, others, strict=True)):
        assert torch.equal(a, b), f"{what}: result {i}"


@parametrize("layout", FORMATS)
def test_a_step_has_the_same_bits_on_any_number_of_threads(network: Any, layout: str) -> None:
    model, images, target = network
    model = model.to(memory_format=FORMATS[layout])
    images = images.contiguous(memory_format=FORMATS[layout])
    with threads(1):
        single = train_step(model, images, target)
    for count in (2, 3, 4, 7):
        with threads(count):
            check_equal(single, train_step(model, images, target), f"{count} threads")


def test_every_kind_of_graph_has_the_same_bits(network: Any) -> None:
    model, images, target = network
    model.train()
    trained = model(images, target).detach()
    model.eval()
    results = {"eval": model(images, target)}
    with torch.no_grad():
        results["no_grad"] = model(images, target)
    with torch.inference_mode():
        results["inference_mode"] = model(images, target)
    model.requires_grad_(False)
    results["frozen"] = model(images, target)
    for name, result in results.items():
        assert torch.equal(result, trained), name


def test_compiled_code_runs_the_same_kernels(network: Any) -> None:
    """aot_eager traces forward and backward as torch.compile does, and leaves other ops alone."""
    model, images, target = network
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check_equal(train_step(model, images, target), train_step(compiled, images, target), "compiled")


def test_one_gradient_does_not_depend_on_the_others_asked_for(network: Any) -> None:
    model, images, target = network
    everything = train_step(model, images, target)
    for i, wanted in enumerate(model.parameters()):
        model.requires_grad_(False)
        wanted.requires_grad_(True)
        (alone,) = torch.autograd.grad(model(images, target), wanted)
        assert torch.equal(alone, everything[2 + i])
