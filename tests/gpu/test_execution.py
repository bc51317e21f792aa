"""How the ops run on a GPU: streams, graphs, never waiting, the same bits, memory, any size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import process
import pytest
import torch
from cases import Conv2dCase, FocalCase, MaxPool2dCase, UnfoldCase
from checks import cast, check_same_bits, normal, values_and_gradients
from problems import Problem, conv2d, focal_loss, fold, max_pool2d, sigmoid_focal_loss, unfold
from test_focal_loss import VARIANTS
from torch import Tensor

import dlops.functional as F

pytestmark = pytest.mark.gpu
parametrize = pytest.mark.parametrize
DEVICE = "cuda"

# Large enough that threads, blocks and chunks run side by side.
LARGE = [
    conv2d(Conv2dCase("3x3", (16, 64, 56, 56), (96, 64, 3, 3), padding=1)),
    conv2d(Conv2dCase("many chunks", (40, 128, 64, 64), (32, 128, 3, 3), padding=1)),
    conv2d(Conv2dCase("split image", (1, 64, 512, 512), (8, 64, 3, 3), padding=1)),
    conv2d(Conv2dCase("strided", (16, 64, 57, 55), (96, 64, 3, 3), stride=2, padding=1)),
    conv2d(Conv2dCase("depthwise", (16, 96, 56, 56), (96, 1, 3, 3), padding=1, groups=96)),
    unfold(UnfoldCase("3x3", (8, 32, 56, 56), 3, padding=1)),
    fold(UnfoldCase("3x3", (8, 32, 56, 56), 3, padding=1)),
    max_pool2d(MaxPool2dCase("3x3", (16, 64, 113, 111), 3, 2, 1)),
    sigmoid_focal_loss(FocalCase("mean", (4099, 80)), soft=False, reduction="mean"),
    sigmoid_focal_loss(FocalCase("soft sum", (4099, 80)), soft=True, reduction="sum"),
    *(
        focal_loss(FocalCase(name, size), variant, gamma=2.0, reduction="mean")
        for name, size in [
            ("short rows", (50021, 10)),
            ("rows", (4099, 1000)),
            ("long rows", (33, 50000)),
            ("image", (4, 21, 129, 130)),
        ]
        for variant in VARIANTS[2::3]
    ),
]
large = parametrize("problem", LARGE, ids=lambda problem: problem.id)
# What bfloat16 goes by, kernels of their own or other products, is convolution's alone.
large_of_dtypes = parametrize(
    "problem, dtype",
    [
        pytest.param(problem, dtype, id=f"{problem.id} {str(dtype).removeprefix('torch.')}")
        for problem in LARGE
        for dtype in (torch.float32, torch.bfloat16)[: 2 if "conv2d" in problem.id else 1]
    ],
)


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    """float32 goes by the tensor cores, but where DLOPS_CUDA_CONV2D asks for im2col."""
    by_tensor_cores = os.environ.get("DLOPS_CUDA_CONV2D") != "im2col"
    torch.set_float32_matmul_precision("high" if by_tensor_cores else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


def inputs_of(problem: Problem, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in cast(problem.inputs, dtype)]


@pytest.mark.determinism
@large
@parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_on_every_run(problem: Problem, dtype: torch.dtype) -> None:
    inputs = inputs_of(problem, dtype)
    check_same_bits([values_and_gradients(problem.ours, inputs) for _ in range(5)])


@large_of_dtypes
def test_never_waits_for_the_device(problem: Problem, dtype: torch.dtype) -> None:
    inputs = inputs_of(problem, dtype)
    leaves = [x for x in inputs if x is not None and x.is_floating_point()]
    for x in leaves:
        x.requires_grad_()
    grad_output = torch.ones_like(problem.ours(*inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(problem.ours(*inputs), leaves, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@large_of_dtypes
def test_runs_on_the_current_stream(problem: Problem, dtype: torch.dtype) -> None:
    """Inputs that come late on a stream of their own are waited for."""
    inputs = inputs_of(problem, dtype)
    expected = values_and_gradients(problem.ours, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [None if x is None else torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for to, x in zip(late, inputs, strict=True):
            if to is not None:
                to.copy_(x)
        results = values_and_gradients(problem.ours, late)
    stream.synchronize()
    check_same_bits([expected, results])


@large_of_dtypes
def test_cuda_graph(problem: Problem, dtype: torch.dtype) -> None:
    """Forward and backward captured once give on new inputs what a plain call gives."""
    inputs = inputs_of(problem, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            values_and_gradients(problem.ours, inputs, fill=ones)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradients(problem.ours, inputs, fill=ones)
    for x in inputs:
        if x is not None:
            x.copy_(x.flip(0))
    graph.replay()
    check_same_bits([captured, values_and_gradients(problem.ours, inputs, fill=ones)])


def ones(size: Any, seed: int) -> Tensor:
    """A fill that needs no transfer from the CPU, which a graph cannot capture."""
    return torch.ones(tuple(size), device=DEVICE)


# ---------------------------------------------------------------------------------------------
# A loss's gradient that waits for backward (dlops/ops/kept_gradient.py)


@cache
def labels() -> Tensor:
    return torch.arange(257, device=DEVICE)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "focal_loss": lambda x, **more: F.focal_loss(x, labels(), **more),
    "sigmoid_focal_loss": lambda x, **more: F.sigmoid_focal_loss(x, torch.zeros_like(x), **more),
}
of_losses = parametrize("loss", LOSSES.values(), ids=LOSSES)
of_dtypes = parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# For 1 nothing is done in backward.
FACTORS = [1.0, 3.0, 1.0, float("inf"), float("nan")]


def logits(dtype: torch.dtype, seed: int = 1) -> Tensor:
    return normal((257, 300), seed).to(DEVICE, dtype).requires_grad_()


def gradient(loss: Callable[..., Tensor], x: Tensor, factor: Tensor) -> Tensor:
    """As backward works it out where nothing waits for it."""
    value = loss(x, reduction="mean")
    return torch.autograd.grad(value, x, factor, create_graph=True)[0].detach()


@pytest.mark.memory
@of_losses
@of_dtypes
def test_a_reduced_loss_keeps_its_gradient(dtype: torch.dtype, loss: Callable[..., Tensor]) -> None:
    for retain in (False, True):
        for factor in FACTORS:
            x = logits(dtype)
            value: Any = loss(x, reduction="mean")
            place = value.grad_fn.saved_tensors[-1].data_ptr()
            grad_output = torch.full_like(value, factor)
            (result,) = torch.autograd.grad(value, x, grad_output, retain_graph=retain)
            assert (result.data_ptr() == place) == (not retain)
            expected = gradient(loss, x, grad_output)
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    each: Any = loss(logits(dtype), reduction="none")
    assert each.grad_fn.saved_tensors[-1] is None


@of_losses
@of_dtypes
def test_a_kept_gradient_waits_for_nothing(dtype: torch.dtype, loss: Callable[..., Tensor]) -> None:
    x = logits(dtype)
    factors = [torch.full((), factor, dtype=dtype, device=DEVICE) for factor in FACTORS]
    loss(x, reduction="mean")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor in factors:
            value = loss(x, reduction="mean")
            torch.autograd.grad(value, x, factor, retain_graph=True)
            torch.autograd.grad(value, x, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@of_losses
@of_dtypes
def test_a_kept_gradient_in_one_graph(dtype: torch.dtype, loss: Callable[..., Tensor]) -> None:
    """Forward and backward together, for factors that change between the replays."""
    x, factor = logits(dtype), torch.ones((), dtype=dtype, device=DEVICE)
    graph = captured(lambda: torch.autograd.grad(loss(x, reduction="mean"), x, factor)[0])
    for seed, number in enumerate(FACTORS):
        with torch.no_grad():
            x.copy_(logits(dtype, seed))
        factor.fill_(number)
        graph[0].replay()
        expected = gradient(loss, x, factor)
        torch.testing.assert_close(graph[1], expected, rtol=0, atol=0, equal_nan=True)


@of_losses
@of_dtypes
def test_a_kept_gradient_whose_backward_has_a_graph(
    dtype: torch.dtype, loss: Callable[..., Tensor]
) -> None:
    """Backward replayed again and again after one forward, its result overwritten meanwhile."""
    x, factor = logits(dtype), torch.ones((), dtype=dtype, device=DEVICE)
    captured(lambda: torch.autograd.grad(loss(x, reduction="mean"), x, factor)[0])
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        value = loss(x, reduction="mean")
    with torch.cuda.graph(backward, pool=forward.pool()):
        (result,) = torch.autograd.grad(value, x, factor)
    forward.replay()
    for number in FACTORS:
        factor.fill_(number)
        backward.replay()
        expected = gradient(loss, x, factor)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        result.zero_()


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call, which has been made before, and the result that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@large
def test_runs_on_the_device_of_its_inputs(problem: Problem) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = inputs_of(problem)
    expected = values_and_gradients(problem.ours, inputs)
    other = [None if x is None else x.to("cuda:1") for x in inputs]
    for name, result in values_and_gradients(problem.ours, other).items():
        assert result.device == torch.device("cuda:1")
        torch.testing.assert_close(result.to(expected[name]), expected[name])


# ---------------------------------------------------------------------------------------------
# Memory


@parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolution_keeps_its_workspace_small(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """The whole column matrix would take 9 times the input; it never exists."""
    input = torch.randn(32, 64, 128, 128, device=DEVICE, dtype=dtype)
    input = input.contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    F.conv2d(input, weight, padding=1).sum().backward()  # what libraries keep for good
    input.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = F.conv2d(input, weight, padding=1)
    output.backward(output.detach())
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before <= held + 200 * 2**20


def room_for(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free / 2**30:.0f}")


@pytest.fixture(autouse=True)
def _give_memory_back() -> Any:
    yield
    torch.cuda.empty_cache()


OVER = 2**31 + 2**20  # elements


def large_images(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """More than 2^31 elements; the last image is unlike the others."""
    x = torch.zeros(size, dtype=dtype, device=DEVICE)
    x[-1] = normal(size[1:], 1).to(dtype)
    return x


def test_pooling_of_more_than_2_31_elements() -> None:
    room_for(24)
    x = large_images((OVER // (64 * 128 * 128) + 1, 64, 128, 128), torch.bfloat16).requires_grad_()
    last = x[-1:].detach().clone().requires_grad_()
    for images in (x, last):
        F.max_pool2d(images, 3, 1, 1)[-1].float().square().sum().backward()
    assert x.grad is not None
    assert last.grad is not None
    assert torch.equal(x.grad[-1:], last.grad)
    assert not x.grad[0].any()


def test_unfold_to_more_than_2_31_elements() -> None:
    room_for(8)
    x = torch.zeros(OVER // (9 * 8 * 512 * 512) + 1, 8, 512, 512, dtype=torch.bool, device=DEVICE)
    x[-1] = normal((8, 512, 512), 1).to(DEVICE) > 0
    columns = F.unfold(x, 3, padding=1)
    assert columns.numel() > 2**31
    assert torch.equal(columns[-1:], F.unfold(x[-1:], 3, padding=1))
    assert not columns[0].any()


@parametrize("channels, size", [(16, 512), (64, 256)])
def test_convolution_of_more_than_2_31_elements(channels: int, size: int) -> None:
    room_for(32)
    images = OVER // (channels * size * size) + 1
    x = large_images((images, channels, size, size), torch.bfloat16).requires_grad_()
    weight = normal((channels, channels, 3, 3), 2).to(DEVICE, torch.bfloat16)
    output = F.conv2d(x, weight, padding=1)
    assert output.numel() > 2**31
    expected = F.conv2d(x[-1:].detach(), weight, padding=1)
    torch.testing.assert_close(output[-1:], expected)
    assert not output[0].any()
    (grad,) = torch.autograd.grad(output, x, output)
    expected = x[-1:].detach().clone().requires_grad_()
    small = F.conv2d(expected, weight, padding=1)
    (expected,) = torch.autograd.grad(small, expected, small)
    torch.testing.assert_close(grad[-1:], expected)


def test_losses_of_more_than_2_31_elements() -> None:
    room_for(32)
    classes = 200_000
    logits = large_images((OVER // classes + 1, classes), torch.bfloat16).requires_grad_()
    target = torch.arange(len(logits), device=DEVICE) % classes
    loss = F.focal_loss(logits, target, reduction="none")
    assert torch.equal(loss[-1:], F.focal_loss(logits[-1:], target[-1:], reduction="none"))
    assert (loss[:-1] == loss[0]).all()
    (grad,) = torch.autograd.grad(loss[-1], logits)
    assert grad[-1].any()
    assert not grad[:-1].any()
    del grad
    targets = torch.zeros_like(logits, requires_grad=False)
    each = F.sigmoid_focal_loss(logits.detach(), targets)
    assert torch.equal(each[-1], F.sigmoid_focal_loss(logits[-1].detach(), targets[-1]))
    assert (each[:-1] == each[0, 0]).all()
    mean = F.sigmoid_focal_loss(logits.detach(), targets, reduction="mean")
    torch.testing.assert_close(mean.double(), each.double().mean(), rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------------------------
# Bad input


def other_device() -> list[Callable[[], Any]]:
    """Calls with one tensor left on the CPU."""
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3)
    logits, target = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    ops: Any = torch.ops.dlops
    cells = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    pool = ([2, 2], [2, 2], [0, 0], [1, 1])
    return [
        lambda: F.conv2d(x.to(DEVICE), weight),
        lambda: F.conv2d(x, weight.to(DEVICE)),
        lambda: F.conv2d(x.to(DEVICE), weight.to(DEVICE), torch.ones(2)),
        lambda: ops.max_pool2d_gather(x.to(DEVICE), cells, *pool),
        lambda: ops.max_pool2d_scatter(cells.float().to(DEVICE), cells, [1, 2, 4, 4], *pool),
        lambda: F.sigmoid_focal_loss(logits.to(DEVICE), logits),
        lambda: F.sigmoid_focal_loss(logits.to(DEVICE), logits.to(DEVICE), torch.ones(4)),
        lambda: F.focal_loss(logits.to(DEVICE), target),
        lambda: F.focal_loss(logits, target.to(DEVICE)),
        lambda: F.focal_loss(logits.to(DEVICE), target.to(DEVICE), torch.ones(4)),
    ]


@pytest.mark.invalid
@parametrize("call", other_device(), ids=range(10))
def test_tensors_on_two_devices_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError), match="cpu"):
        call()


@pytest.mark.invalid
@parametrize("classes", [5, 100, 5000])
def test_a_target_out_of_range_is_named(classes: int, tmp_path: Any) -> None:
    """As in native the kernel stops, which ends the process's use of the device; the message says
    which target it was."""
    code = f"""
import torch, dlops.functional as F
target = torch.tensor([0, -100, 1, {classes + 2}], device="cuda")
F.focal_loss(torch.zeros(4, {classes}, device="cuda"), target).item()
"""
    result = process.run("-c", code, cwd=tmp_path)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert f"target {classes + 2} at position 3 is out of bounds for {classes} classes" in said
    assert "device-side assert" in said
