"""dlops.functional.sigmoid_focal_loss: torchvision's signature and meaning."""

from __future__ import annotations

from functools import partial
from typing import Any

import native
import numpy as np
import pytest
import torch
from cases import FOCAL, GAMMAS, LAYOUTS, SMALL_FOCAL, FocalCase, ids
from checks import (
    cast,
    check_against_native,
    check_gradients,
    check_runs_ours,
    check_same_bits,
    check_same_layout,
    normal,
    threads,
    values_and_gradients,
)
from tolerances import DTYPES, TOLERANCES, assert_elementwise, error
from torch import Tensor

import dlops.functional as F
from dlops import reference

parametrize = pytest.mark.parametrize
REDUCTIONS = ["none", "mean", "sum"]
ALPHAS = [0.25, 1.0, -1.0]
targets_of = parametrize(
    "targets", [FocalCase.hard_targets, FocalCase.soft_targets], ids=["hard", "soft"]
)


def both(**arguments: Any) -> tuple[Any, Any]:
    return partial(F.sigmoid_focal_loss, **arguments), partial(
        native.sigmoid_focal_loss, **arguments
    )


def oracle(inputs: Tensor, targets: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Value and gradients by the NumPy formulas, named as `values_and_gradients` does."""
    arrays: list[Any] = [x.double().numpy() for x in (inputs, targets)]
    value = np.asarray(reference.sigmoid_focal_loss(*arrays, **arguments))
    grad_output = normal(value.shape, 99).to(inputs.dtype).double()
    gradients = reference.sigmoid_focal_loss_backward(grad_output, *arrays, **arguments)
    results = dict(zip(("value", "gradient 0", "gradient 1"), (value, *gradients), strict=True))
    return {name: torch.as_tensor(x) for name, x in results.items()}


# ---------------------------------------------------------------------------------------------
# Against native, numerical gradients and the oracle


@pytest.mark.native
@targets_of
@parametrize("gamma", GAMMAS)
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", FOCAL, ids=ids)
def test_native(case: FocalCase, dtype: torch.dtype, gamma: float, targets: Any) -> None:
    for alpha, reduction in zip(ALPHAS, REDUCTIONS, strict=True):
        ops = both(alpha=alpha, gamma=gamma, reduction=reduction)
        check_against_native(*ops, [case.logits(), targets(case)], dtype)


@pytest.mark.native
def test_defaults_are_torchvisions() -> None:
    case = FOCAL[3]
    ours = F.sigmoid_focal_loss(case.logits(), case.hard_targets())
    torch.testing.assert_close(
        ours, native.sigmoid_focal_loss(case.logits(), case.hard_targets()), rtol=1e-13, atol=1e-15
    )


@pytest.mark.gradcheck
@targets_of
@parametrize("gamma", GAMMAS)
@parametrize("case", SMALL_FOCAL, ids=ids)
def test_gradcheck(case: FocalCase, gamma: float, targets: Any) -> None:
    for alpha, reduction in zip(ALPHAS, REDUCTIONS, strict=True):
        if reduction == "mean" and case.id == "empty_batch":
            continue  # the mean of nothing is NaN
        loss = both(alpha=alpha, gamma=gamma, reduction=reduction)[0]
        check_gradients(loss, [case.logits(), targets(case)])


@pytest.mark.oracle
@targets_of
@parametrize("reduction", REDUCTIONS)
@parametrize("gamma", GAMMAS)
@parametrize("case", SMALL_FOCAL, ids=ids)
def test_oracle(case: FocalCase, gamma: float, reduction: str, targets: Any) -> None:
    """With one alpha for all, none, and one for each of the last dimension's entries."""
    per_class = torch.linspace(0.1, 0.9, case.input[-1], dtype=torch.float64)
    inputs = [case.logits(), targets(case)]
    for alpha in (0.25, -1.0, per_class):
        arguments: dict[str, Any] = {"gamma": gamma, "reduction": reduction}
        ours = values_and_gradients(both(alpha=alpha, **arguments)[0], inputs)
        array = alpha.numpy() if isinstance(alpha, Tensor) else alpha
        for name, truth in oracle(*inputs, alpha=array, **arguments).items():
            assert ours[name].shape == truth.shape
            assert error(ours[name], truth) < 1e-13, name


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
def test_per_class_alpha_is_one_call_for_each_class(dtype: torch.dtype) -> None:
    case = FOCAL[3]
    inputs, targets = cast([case.logits(), case.hard_targets()], dtype)
    alpha = torch.linspace(0, 1, case.classes).to(dtype)
    together = F.sigmoid_focal_loss(inputs, targets, alpha)
    for c in range(case.classes):
        alone = F.sigmoid_focal_loss(inputs[:, c], targets[:, c], alpha[c].item())
        assert error(together[:, c], alone) <= TOLERANCES[dtype].bound


# ---------------------------------------------------------------------------------------------
# Extreme logits, NaN, infinities

EXTREME = [20.0, 100.0, 1e4, 0.0, -20.0, -100.0, -1e4]


@pytest.mark.special
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("gamma", GAMMAS)
@parametrize("alpha", ALPHAS)
def test_extreme_logits(alpha: float, gamma: float, dtype: torch.dtype) -> None:
    """Value and gradient are finite and have every digit, as p tends to 0 and to 1."""
    logits = torch.tensor(EXTREME, dtype=dtype).repeat(40)
    arguments: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "reduction": "none"}
    for target in (0.0, 1.0):
        targets = torch.full_like(logits, target)
        loss = partial(F.sigmoid_focal_loss, targets=targets, **arguments)
        ours = values_and_gradients(loss, [logits])
        truth = oracle(logits, targets, **arguments)
        for name, result in ours.items():
            assert result.isfinite().all(), name
            assert_elementwise(result, truth[name], name, dtype)


@pytest.mark.special
@parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@parametrize("gamma", GAMMAS)
def test_extreme_logits_with_soft_targets(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor(EXTREME, dtype=dtype)
    for target in (0.0, 0.25, 0.5, 0.75, 1.0):
        inputs = [logits, torch.full_like(logits, target)]
        ours = values_and_gradients(both(gamma=gamma)[0], inputs)
        truth = oracle(*inputs, gamma=gamma)
        for name, result in ours.items():
            assert result.isfinite().all(), f"{name} at target {target}"
            assert error(result, truth[name]) <= TOLERANCES[dtype].bound, name


@pytest.mark.special
@targets_of
@parametrize("gamma", [0.0, 2.0])
def test_nan_and_infinite_logits(gamma: float, targets: Any) -> None:
    """A NaN stays one; infinity on the wrong side costs infinity, on the right side nothing."""
    nan = torch.full((3, 4), float("nan"))
    assert F.sigmoid_focal_loss(nan, targets(FocalCase("", (3, 4))).float()).isnan().all()
    infinite = torch.tensor([float("inf"), -float("inf")], dtype=torch.float64)
    right, wrong = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert F.sigmoid_focal_loss(infinite, wrong, gamma=gamma).isposinf().all()
    assert (F.sigmoid_focal_loss(infinite, right, gamma=gamma) == 0).all()


@pytest.mark.special
@parametrize("gamma", [0.0, 0.5, 2.0])
def test_infinite_logits_with_soft_targets(gamma: float) -> None:
    """The loss is infinite, its slope is not."""
    logits = torch.tensor([float("inf"), -float("inf")], dtype=torch.float64)
    finite = torch.tensor([1e5, -1e5], dtype=torch.float64)
    results, limit = (
        values_and_gradients(both(gamma=gamma)[0], [x, torch.full((2,), 0.3).double()])
        for x in (logits, finite)
    )
    assert results["value"].isposinf().all()
    assert error(results["gradient 0"], limit["gradient 0"]) < 1e-13


@pytest.mark.special
@parametrize("gamma", [1e18, 1e300, float("inf")])
def test_the_largest_gammas(gamma: float) -> None:
    """All but hopeless elements are played down to nothing."""
    for dtype in (torch.float64, torch.float32):
        logits = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype)
        ours = values_and_gradients(both(gamma=gamma)[0], [logits, torch.ones_like(logits)])
        assert all(result.isfinite().all() for result in ours.values())
        assert torch.equal(ours["value"], torch.tensor([2500.0, 0, 0, 0, 0], dtype=dtype))


# ---------------------------------------------------------------------------------------------
# Layouts, kernels, determinism


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
@targets_of
def test_layout(layout: str, targets: Any) -> None:
    case = FocalCase("", (3, 5, 4, 6))
    laid_out = [LAYOUTS[layout](x) for x in (case.logits(), targets(case))]
    ours, theirs = (values_and_gradients(op, laid_out) for op in both())
    for name, result in ours.items():
        assert error(result, theirs[name]) < 1e-13, name
    if layout in ("contiguous", "channels_last"):
        check_same_layout(ours["value"], theirs["value"], "value")


@pytest.mark.layout
def test_different_layouts() -> None:
    case = FocalCase("", (3, 5, 4, 6))
    logits, targets = LAYOUTS["channels_last"](case.logits()), case.hard_targets()
    ours, theirs = (op(logits, targets) for op in both())
    assert error(ours, theirs) < 1e-13


@pytest.mark.native
@targets_of
def test_runs_our_kernels(targets: Any) -> None:
    case = FOCAL[3]
    check_runs_ours(both()[0], [case.logits(), targets(case)], "sigmoid_focal_loss")


@pytest.mark.determinism
@parametrize("reduction", REDUCTIONS)
@parametrize("dtype", DTYPES, ids=ids)
@targets_of
def test_same_bits_on_every_run_and_thread_count(
    targets: Any, dtype: torch.dtype, reduction: str
) -> None:
    case = FocalCase("", (10007, 11))
    inputs = cast([case.logits(), targets(case)], dtype)
    results = []
    for count in (2, 1, 2):
        with threads(count):
            results.append(values_and_gradients(both(reduction=reduction)[0], inputs))
    check_same_bits(results)
