"""Every op on a GPU: as native there, as dlops on the CPU, and gradients as numerical ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import native
import pytest
import torch
from cases import LAYOUTS, Conv2dCase, FocalCase, ids
from checks import (
    Inputs,
    cast,
    check_against_native,
    check_exact,
    check_gradients,
    check_same_layout,
    normal,
    small_integers,
    values_and_gradients,
)
from problems import PROBLEMS, Problem, images, pooling
from test_focal_loss import VARIANTS
from tolerances import DTYPES, assert_accurate, error
from torch import Tensor

import dlops.functional as F

pytestmark = pytest.mark.gpu
parametrize = pytest.mark.parametrize
DEVICE = "cuda"
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    """float32 is float32 on both sides; our precision switch is the one of matrix products."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


def on_gpu(inputs: Inputs) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in inputs]


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("problem", PROBLEMS, ids=ids)
def test_native(problem: Problem, dtype: torch.dtype) -> None:
    check_against_native(problem.ours, problem.native, on_gpu(problem.inputs), dtype)


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("problem", PROBLEMS, ids=ids)
def test_cpu(problem: Problem, dtype: torch.dtype) -> None:
    """As near to the float64 truth as dlops on the CPU."""
    inputs = cast(problem.inputs, dtype)
    truth = values_and_gradients(problem.ours, cast(inputs, torch.float64), dtype)
    on_cpu = values_and_gradients(problem.ours, inputs)
    for name, result in values_and_gradients(problem.ours, on_gpu(inputs)).items():
        assert result.device.type == DEVICE
        assert_accurate(result, on_cpu[name], truth[name], name)


@pytest.mark.gradcheck
@parametrize("problem", [problem for problem in PROBLEMS if problem.small], ids=ids)
def test_gradcheck(problem: Problem) -> None:
    check_gradients(problem.ours, on_gpu(problem.inputs))


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("problem", [*images(small_integers), *pooling(fill=small_integers)], ids=ids)
def test_exact_on_small_integers(problem: Problem, dtype: torch.dtype) -> None:
    check_exact(problem.ours, problem.native, on_gpu(problem.inputs), dtype)


@pytest.mark.exact
@parametrize("dtype", INTEGERS, ids=ids)
@parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_pooling_of_integers(layout: str, dtype: torch.dtype) -> None:
    for problem in pooling():
        x = problem.inputs[0]
        assert x is not None
        # Native has integers on the CPU alone.
        x = (x * 30).abs().to(dtype)
        ours = problem.ours(LAYOUTS[layout](x.to(DEVICE)), return_indices=True)
        for result, expected in zip(ours, problem.native(x, return_indices=True), strict=True):
            assert torch.equal(result.cpu(), expected), problem.id


@pytest.mark.native
@parametrize("dtype", [torch.complex64, torch.complex128], ids=ids)
@parametrize("case", ["3x3", "grouped", "1x1"])
def test_complex_convolution(case: str, dtype: torch.dtype) -> None:
    problem = next(problem for problem in images() if problem.id == f"conv2d {case}")
    inputs = [
        None if x is None else torch.complex(x, x.flip(0)).to(dtype).to(DEVICE)
        for x in problem.inputs
    ]
    ours = values_and_gradients(problem.ours, inputs)
    theirs = values_and_gradients(problem.native, inputs)
    for name, result in ours.items():
        torch.testing.assert_close(result, theirs[name])


def test_integer_convolution_is_refused() -> None:
    x = torch.ones(1, 1, 3, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="input must be floating-point or complex"):
        F.conv2d(x, x)


# ---------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.layout
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", LAYOUTS)
@parametrize("case", ["3x3", "1x1", "grouped", "depthwise", "asymmetric"])
def test_layout_of_images(case: str, layout: str, dtype: torch.dtype) -> None:
    """The strides of the results are those that dlops gives on the CPU."""
    for name in (f"conv2d {case}", f"max_pool2d {case}"):
        problem = next((p for p in PROBLEMS if p.id == name), None)
        if problem is None:
            continue
        image, *others = cast(problem.inputs, dtype)
        assert image is not None
        inputs = [LAYOUTS[layout](image), *others]
        moved = [LAYOUTS[layout](image.to(DEVICE)), *on_gpu(others)]
        on_cpu = values_and_gradients(problem.ours, inputs)
        truth = values_and_gradients(problem.ours, cast(inputs, torch.float64), dtype)
        for key, result in values_and_gradients(problem.ours, moved).items():
            assert_accurate(result, on_cpu[key], truth[key], key)
            check_same_layout(result, on_cpu[key], key)


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
@parametrize("variant", VARIANTS, ids=ids)
def test_layout_of_logits(variant: Any, layout: str) -> None:
    case = FocalCase("", (3, 5, 4, 6))
    logits, target = case.logits().to(DEVICE), variant.target(case).to(DEVICE)
    loss = variant.bind(F.focal_loss, case, gamma=2.0, reduction="none")
    strided = values_and_gradients(loss, [LAYOUTS[layout](logits), target])
    plain = values_and_gradients(loss, [LAYOUTS[layout](logits).contiguous(), target])
    for name, result in strided.items():
        assert error(result, plain[name]) < 1e-14, name


@pytest.mark.layout
def test_channels_at_any_address() -> None:
    """Vector loads take only what the address and the number of channels allow."""
    for channels in (1, 2, 3, 4, 6, 8, 12, 16):
        room = normal((2, channels, 6, 7), 1).half().to(DEVICE)
        storage = torch.empty(room.numel() + 9, dtype=room.dtype, device=DEVICE)
        weight = normal((3, channels, 3, 3), 2).half().to(DEVICE)
        expected = F.conv2d(room, weight)
        for offset in (0, 1, 2, 4):
            shifted = storage[offset : offset + room.numel()].view(2, 6, 7, channels)
            shifted.copy_(room.permute(0, 2, 3, 1))
            result = F.conv2d(shifted.permute(0, 3, 1, 2), weight)
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Softmax rows of every length: a thread, some of a warp, a warp or a block each


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("classes", [1, 2, 16, 17, 31, 33, 80, 257, 1000, 1025, 2048, 2049, 5000, 200_000])
@parametrize("variant", VARIANTS, ids=ids)
def test_number_of_classes(variant: Any, classes: int, dtype: torch.dtype) -> None:
    case = FocalCase("", (5, classes))
    inputs = on_gpu([case.logits(), variant.target(case)])
    for reduction in ("none", "mean"):
        ours = variant.bind(F.focal_loss, case, dtype, gamma=0.0, reduction=reduction)
        theirs = variant.bind(native.cross_entropy, case, dtype, reduction=reduction)
        check_against_native(ours, theirs, inputs, dtype)
    if classes > 1:
        ours, theirs = (
            variant.bind(f, case, dtype, gamma=2.0) for f in (F.focal_loss, native.focal_loss)
        )
        check_against_native(ours, theirs, inputs, dtype)


@pytest.mark.special
@parametrize("classes", [3, 100, 5000])
def test_infinite_and_nan_logits(classes: int) -> None:
    logits = normal((8, classes), 1).float()
    logits[0, 1] = float("nan")
    logits[1, 2] = float("inf")
    logits[2] = -float("inf")
    logits[3, 1:] = -float("inf")
    logits[4, ::2] = -float("inf")
    logits[5] = 0
    logits[6, 0] = 1e4
    target = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])
    for gamma in (0.0, 0.5, 2.0):
        loss = partial(F.focal_loss, target=target, gamma=gamma, reduction="none")
        on_cpu = values_and_gradients(loss, [logits])
        loss = partial(F.focal_loss, target=target.to(DEVICE), gamma=gamma, reduction="none")
        for name, result in values_and_gradients(loss, [logits.to(DEVICE)]).items():
            torch.testing.assert_close(result.cpu(), on_cpu[name], equal_nan=True)


# ---------------------------------------------------------------------------------------------
# Precision


@pytest.mark.native
def test_tf32_follows_the_switch_of_matrix_products() -> None:
    case = Conv2dCase("", (8, 64, 28, 28), (64, 64, 3, 3), padding=1)
    inputs = on_gpu(cast(case.tensors(), torch.float32))
    conv = partial(F.conv2d, **case.arguments())
    truth = conv(*cast(inputs, torch.float64))
    exact = conv(*inputs)
    assert error(exact, truth) < 2e-6
    torch.set_float32_matmul_precision("high")
    assert error(conv(*inputs), truth) < 2e-3
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(conv(*inputs), exact)
