"""The losses' CUDA kernels by themselves: loss and gradient in one pass have the bits that each has
alone, a gradient that waited becomes the one for any grad_output, and rows of any length and
address, whose largest logit stands anywhere, are as near to the truth as native's.

test_on_host.py runs these tests on the CPU, where csrc/cuda is compiled as plain C++.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import native
import pytest
import torch
from cases import FocalCase, ids
from checks import cast, check_against_native, normal
from test_focal_loss import VARIANTS, Variant
from tolerances import DTYPES
from torch import Tensor

import dlops.functional as F

DEVICE = os.environ.get("DLOPS_TEST_DEVICE", "cuda")
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu
parametrize = pytest.mark.parametrize
dtypes = parametrize("dtype", DTYPES, ids=ids)
variants = parametrize("variant", VARIANTS, ids=ids)
ops: Any = torch.ops.dlops
NONE, MEAN, SUM = 0, 1, 2
FACTORS = [1.0, -0.37, 1024.0, 0.0, math.inf, math.nan]

# A thread, some lanes, a warp or a block for a row, one chunk of it in the registers and several;
# rows whose elements lie apart, few and many; rows that cannot be read 16 bytes at a time.
CASES = [
    FocalCase("thread", (70, 7)),
    FocalCase("lanes", (37, 80)),
    FocalCase("lanes_odd", (37, 91)),
    FocalCase("warp", (9, 520)),
    FocalCase("block", (3, 2504)),
    FocalCase("block_odd", (3, 2501)),
    FocalCase("chunks", (2, 20008)),
    FocalCase("apart", (3, 5, 4, 3)),
    FocalCase("apart_many", (2, 300, 7, 5)),
    FocalCase("apart_chunks", (1, 2600, 3)),
]
cases = parametrize("case", CASES, ids=ids)


def to_device(*tensors: Any) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in tensors]


def softmax_call(case: FocalCase, variant: Variant, dtype: torch.dtype) -> list[Any]:
    """The op's arguments but for the reduction."""
    weight = case.weight() if variant.weight else None
    tensors = to_device(*cast([case.logits(), variant.target(case), weight], dtype))
    return [*tensors, 2.0, -100]


def sigmoid_call(soft: bool, dtype: torch.dtype, odd: int) -> list[Any]:
    case = FocalCase("", (33, 80 + odd))
    targets = case.soft_targets() if soft else case.hard_targets()
    return [*to_device(*cast([case.logits(), targets], dtype)), None, 0.25, 2.0]


def check_and_grad(name: str, call: list[Any], dtype: torch.dtype) -> None:
    """Of one pass, and the gradient scaled afterwards, against the ops of one result each."""
    and_grad, value, vjp, scale_grad = (
        getattr(ops, f"{name}{suffix}") for suffix in ("_and_grad", "", "_vjp", "_scale_grad")
    )
    loss, *normalizer, gradient = and_grad(*call)
    alone = value(*call)
    assert torch.equal(loss, alone[0] if normalizer else alone)
    for factor in FACTORS:
        for grad_output in (torch.full_like(loss, factor), normal(loss.shape, 3).to(loss)):
            expected = vjp(grad_output, *normalizer, *call, [True, False])[0]
            scaled = gradient.clone()
            scale_grad(scaled, grad_output, *normalizer, *call)
            torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.exact
@cases
@variants
@dtypes
def test_softmax_loss_and_gradient(dtype: torch.dtype, variant: Variant, case: FocalCase) -> None:
    for reduction in (NONE, MEAN, SUM):
        call = [*softmax_call(case, variant, dtype), reduction, variant.label_smoothing]
        check_and_grad("focal_loss", call, dtype)


@pytest.mark.exact
@parametrize("odd", [0, 1])
@parametrize("soft", [False, True])
@dtypes
def test_sigmoid_loss_and_gradient(dtype: torch.dtype, soft: bool, odd: int) -> None:
    for reduction in (NONE, MEAN, SUM):
        check_and_grad("sigmoid_focal_loss", [*sigmoid_call(soft, dtype, odd), reduction], dtype)


@pytest.mark.memory
@parametrize("reduction", [MEAN, SUM])
def test_a_gradient_for_one_stays_as_it_is(reduction: int) -> None:
    """Whatever it holds: nothing is read or written."""
    dtype = torch.float32
    calls = {
        "focal_loss": [*softmax_call(CASES[1], VARIANTS[0], dtype), reduction, 0.0],
        "sigmoid_focal_loss": [*sigmoid_call(False, dtype, 0), reduction],
    }
    for name, call in calls.items():
        loss, *normalizer, gradient = getattr(ops, f"{name}_and_grad")(*call)
        left = torch.full_like(gradient, 7)
        getattr(ops, f"{name}_scale_grad")(left, torch.ones_like(loss), *normalizer, *call)
        assert (left == 7).all()


@pytest.mark.layout
def test_a_gradient_in_another_layout_is_scaled() -> None:
    case = FocalCase("", (2, 8, 4, 3))
    call = [*softmax_call(case, VARIANTS[0], torch.float32), SUM, 0.0]
    loss, normalizer, gradient = ops.focal_loss_and_grad(*call)
    turned = gradient.contiguous(memory_format=torch.channels_last)
    for grad_output in (torch.ones_like(loss), torch.full_like(loss, 3)):
        ops.focal_loss_scale_grad(turned, grad_output, normalizer, *call)
        torch.testing.assert_close(turned, gradient * grad_output)


@pytest.mark.native
@cases
@parametrize("dtype", DTYPES[1:], ids=ids)
def test_native(dtype: torch.dtype, case: FocalCase) -> None:
    """In float64 the measure itself is no better than ours."""
    for variant in VARIANTS:
        ours = variant.bind(F.focal_loss, case, dtype, gamma=0.0)
        theirs = variant.bind(native.cross_entropy, case, dtype)
        inputs = to_device(case.logits(), variant.target(case))
        check_against_native(ours, theirs, inputs, dtype)


@pytest.mark.native
@parametrize("classes", [7, 80, 520, 5003])
@dtypes
def test_rows_that_rise_and_fall(dtype: torch.dtype, classes: int) -> None:
    """A sum that starts from a small logit is made relative to larger ones again and again."""
    rising = torch.linspace(-30, 30, classes, dtype=torch.float64)
    slowly = rising / 3000
    rows = torch.stack([rising, rising.flip(0), slowly, slowly.flip(0), 0 * rising])
    for target in (torch.arange(5) % classes, torch.full((5,), classes - 1)):
        ours, theirs = (
            partial(f, target=target.to(DEVICE), reduction="none", **more)
            for f, more in ((F.focal_loss, {"gamma": 0.0}), (native.cross_entropy, {}))
        )
        check_against_native(ours, theirs, to_device(rows), dtype)


@pytest.mark.special
@parametrize("classes", [7, 80, 520, 5003])
def test_special_logits_anywhere(classes: int) -> None:
    """Infinite, NaN and equal ones at the ends of what a thread reads, as in native."""
    places = sorted({0, 1, 3, 4, classes // 2, classes - 2, classes - 1})
    rows, targets = [], []
    for place in places:
        for special in (math.inf, -math.inf, math.nan, 50.0):
            row = normal((classes,), place).float()
            row[place] = special
            alone = torch.full_like(row, -math.inf)
            alone[place] = special
            twice = row.clone()
            twice[-1 - place] = special
            rows += [row, alone, twice]
            targets += [place, place, 0]
    rows.append(torch.full((classes,), -math.inf))
    targets.append(0)
    logits, target = torch.stack(rows).to(DEVICE), torch.tensor(targets, device=DEVICE)
    results = []
    for loss in (partial(F.focal_loss, gamma=0.0), native.cross_entropy):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target, reduction="none")
        results += [value.detach(), torch.autograd.grad(value.sum(), leaf)[0]]
    torch.testing.assert_close(results[0], results[2], equal_nan=True)
    # A class that has no probability takes no gradient, though the others' loss be infinite.
    finite = results[2].isfinite()
    torch.testing.assert_close(results[1][finite], results[3][finite])


@pytest.mark.layout
@dtypes
def test_rows_at_any_address(dtype: torch.dtype) -> None:
    case = FocalCase("", (5, 168))
    target = case.indices(ignored=True).to(DEVICE)
    logits = case.logits().to(DEVICE, dtype)
    expected = ops.focal_loss_and_grad(logits, target, None, 2.0, -100, MEAN, 0.0)
    storage = torch.empty(logits.numel() + 9, dtype=dtype, device=DEVICE)
    for offset in range(9):
        shifted = storage[offset : offset + logits.numel()].view_as(logits).copy_(logits)
        results = ops.focal_loss_and_grad(shifted, target, None, 2.0, -100, MEAN, 0.0)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other)
