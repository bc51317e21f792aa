"""dlops.functional.unfold and fold: im2col and its transpose."""

from __future__ import annotations

from functools import partial
from typing import Any

import native
import pytest
import torch
from cases import LAYOUTS, UNFOLD, UnfoldCase, ids
from checks import (
    Fill,
    cast,
    check_against_native,
    check_exact,
    check_gradients,
    check_runs_ours,
    check_same_bits,
    check_same_layout,
    normal,
    small_integers,
    threads,
    values_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DTYPES

import dlops.functional as F
from dlops import reference

parametrize = pytest.mark.parametrize


def unfolds(case: UnfoldCase, fill: Fill = normal) -> tuple[Any, Any, list[torch.Tensor]]:
    """Our unfold, native's, and its input."""
    arguments = case.arguments()
    return partial(F.unfold, **arguments), partial(native.unfold, **arguments), [case.image(fill)]


def folds(case: UnfoldCase, fill: Fill = normal) -> tuple[Any, Any, list[torch.Tensor]]:
    """Our fold, native's, and its input."""
    arguments = {"output_size": case.input[-2:], **case.arguments()}
    return partial(F.fold, **arguments), partial(native.fold, **arguments), [case.columns(fill)]


both_ops = parametrize("op", [unfolds, folds], ids=["unfold", "fold"])


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", UNFOLD, ids=ids)
@both_ops
def test_native(op: Any, case: UnfoldCase, dtype: torch.dtype) -> None:
    ours, theirs, inputs = op(case)
    check_against_native(ours, theirs, inputs, dtype)


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", UNFOLD, ids=ids)
@both_ops
def test_exact_on_small_integers(op: Any, case: UnfoldCase, dtype: torch.dtype) -> None:
    ours, theirs, inputs = op(case, small_integers)
    check_exact(ours, theirs, inputs, dtype)


@pytest.mark.gradcheck
@parametrize("case", UNFOLD, ids=ids)
@both_ops
def test_gradcheck(op: Any, case: UnfoldCase) -> None:
    ours, _, inputs = op(case)
    check_gradients(ours, inputs)


@pytest.mark.oracle
@parametrize("case", [case for case in UNFOLD if len(case.input) == 4], ids=ids)
def test_oracle(case: UnfoldCase) -> None:
    image, columns = case.image(), case.columns()
    unfolded = reference.unfold(image.numpy(), **case.arguments())
    assert torch.equal(F.unfold(image, **case.arguments()), torch.from_numpy(unfolded))
    folded = reference.fold(columns.numpy(), case.input[2:], **case.arguments())
    ours = F.fold(columns, case.input[2:], **case.arguments())
    torch.testing.assert_close(ours, torch.from_numpy(folded), rtol=1e-12, atol=1e-12)


@pytest.mark.layout
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", LAYOUTS)
def test_unfold_layout(layout: str, dtype: torch.dtype) -> None:
    image = LAYOUTS[layout](normal((3, 4, 7, 6)).to(dtype))
    arguments = {"kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2)}
    ours, theirs = F.unfold(image, **arguments), native.unfold(image, **arguments)
    assert torch.equal(ours, theirs)
    check_same_layout(ours, theirs, "value")


@pytest.mark.layout
@parametrize("layout", ["contiguous", "sliced", "transposed", "expanded"])
def test_fold_layout(layout: str) -> None:
    columns = LAYOUTS[layout](normal((3, 24, 21)))
    arguments = {"output_size": (7, 6), "kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2)}
    ours, theirs = F.fold(columns, **arguments), native.fold(columns, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    check_same_layout(ours, theirs, "value")


@pytest.mark.special
@both_ops
@parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(op: Any, value: float) -> None:
    ours, theirs, (input,) = op(UNFOLD[0])
    input.view(-1)[7] = value
    torch.testing.assert_close(ours(input), theirs(input), rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.native
@both_ops
def test_runs_our_kernels(op: Any) -> None:
    ours, _, inputs = op(UNFOLD[2])
    check_runs_ours(ours, inputs, op.__name__.removesuffix("s"))


@pytest.mark.determinism
@both_ops
@parametrize("dtype", DTYPES, ids=ids)
def test_same_bits_on_every_run_and_thread_count(op: Any, dtype: torch.dtype) -> None:
    ours, _, inputs = op(UnfoldCase("", (4, 17, 23, 21), 3, padding=1))
    results = []
    for count in (2, 1, 2):
        with threads(count):
            results.append(values_and_gradients(ours, cast(inputs, dtype)))
    check_same_bits(results)


@st.composite
def unfold_cases(draw: st.DrawFn) -> UnfoldCase:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 3)
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    image = [draw(st.integers(size, size + 9)) for size in least]
    input = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *image)
    return UnfoldCase("drawn", input, kernel, dilation, padding, pair(1, 3))


@pytest.mark.property
@given(unfold_cases())
def test_fold_is_the_transpose_of_unfold(case: UnfoldCase) -> None:
    """<unfold(x), y> = <x, fold(y)>, exactly on small integers; and both equal native."""
    x, y = case.image(small_integers), case.columns(small_integers)
    unfolded = F.unfold(x, **case.arguments())
    folded = F.fold(y, case.input[2:], **case.arguments())
    assert (unfolded * y).sum() == (x * folded).sum()
    assert torch.equal(unfolded, native.unfold(x, **case.arguments()))
    assert torch.equal(folded, native.fold(y, case.input[2:], **case.arguments()))
