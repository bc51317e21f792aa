"""dlops.functional.focal_loss (softmax) and class_balanced_weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
Loss = Callable[[Tensor, Tensor], Tensor]


class Variant(NamedTuple):
    """Which of the loss's arguments are in use."""

    id: str
    probabilities: bool = False
    ignored: bool = False
    weight: bool = False
    label_smoothing: float = 0.0

    def target(self, case: FocalCase) -> Tensor:
        return case.probabilities() if self.probabilities else case.indices(self.ignored)

    def arguments(self, case: FocalCase) -> dict[str, Any]:
        weight = case.weight() if self.weight else None
        return {"weight": weight, "label_smoothing": self.label_smoothing}

    def bind(
        self, function: Any, case: FocalCase, dtype: torch.dtype = torch.float64, **more: Any
    ) -> Loss:
        """`function` of input and target alone; the weight holds values that `dtype` can hold."""
        arguments = self.arguments(case)
        weight = arguments.pop("weight")
        # Copied to a device by the first call alone: a copy is waited for, and no graph takes it.
        copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

        def loss(input: Tensor, target: Tensor) -> Tensor:
            place = (input.device, input.dtype)
            if weight is not None and place not in copies:
                copies[place] = weight.to(dtype).to(*place)
            return function(input, target, copies.get(place), **arguments, **more)

        return loss


VARIANTS = [
    Variant("indices"),
    Variant("ignored", ignored=True),
    Variant("weight_ignored", ignored=True, weight=True),
    Variant("smoothing", label_smoothing=0.1),
    Variant("weight_ignored_smoothing", ignored=True, weight=True, label_smoothing=0.3),
    Variant("probabilities", probabilities=True),
    Variant("probabilities_weight_smoothing", probabilities=True, weight=True, label_smoothing=0.2),
]

variants = parametrize("variant", VARIANTS, ids=ids)


# ---------------------------------------------------------------------------------------------
# Against native, numerical gradients and the oracle


@pytest.mark.native
@variants
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", FOCAL, ids=ids)
def test_gamma_0_is_cross_entropy(case: FocalCase, dtype: torch.dtype, variant: Variant) -> None:
    for reduction in REDUCTIONS:
        ours = variant.bind(F.focal_loss, case, dtype, gamma=0.0, reduction=reduction)
        theirs = variant.bind(native.cross_entropy, case, dtype, reduction=reduction)
        check_against_native(ours, theirs, [case.logits(), variant.target(case)], dtype)


@pytest.mark.native
@parametrize("gamma", GAMMAS[1:])
@parametrize("dtype", DTYPES, ids=ids)
# One class has p = 1, where the gradient of the native formula is NaN: the oracle covers it.
@parametrize("case", [case for case in FOCAL if case.classes > 1], ids=ids)
def test_native_formula(case: FocalCase, dtype: torch.dtype, gamma: float) -> None:
    for i, variant in enumerate(VARIANTS):
        ours, theirs = (
            variant.bind(function, case, dtype, gamma=gamma, reduction=REDUCTIONS[i % 3])
            for function in (F.focal_loss, native.focal_loss)
        )
        check_against_native(ours, theirs, [case.logits(), variant.target(case)], dtype)


@pytest.mark.gradcheck
@parametrize("gamma", GAMMAS)
@parametrize("case", SMALL_FOCAL, ids=ids)
def test_gradcheck(case: FocalCase, gamma: float) -> None:
    for i, variant in enumerate(VARIANTS):
        # A mean over ignored rows alone is NaN.
        reduction = "none" if case.rows == () else REDUCTIONS[i % 3]
        loss = variant.bind(F.focal_loss, case, gamma=gamma, reduction=reduction)
        check_gradients(loss, [case.logits(), variant.target(case)])


def oracle(inputs: list[Tensor], **arguments: Any) -> dict[str, Tensor]:
    """Value and gradients by the NumPy loops, in float64, named as `values_and_gradients` does."""
    if arguments.get("weight") is not None:
        arguments["weight"] = arguments["weight"].numpy()
    arrays = cast(inputs, torch.float64)
    value = np.asarray(reference.focal_loss(*arrays, **arguments))
    grad_output = normal(value.shape, 99).to(inputs[0].dtype).double()
    gradients = reference.focal_loss_backward(grad_output, *arrays, **arguments)
    results = dict(zip(("value", "gradient 0", "gradient 1"), (value, *gradients), strict=True))
    return {name: torch.as_tensor(x) for name, x in results.items() if x is not None}


@pytest.mark.oracle
@variants
@parametrize("gamma", GAMMAS)
@parametrize("case", SMALL_FOCAL, ids=ids)
def test_oracle(case: FocalCase, gamma: float, variant: Variant) -> None:
    for reduction in REDUCTIONS:
        inputs = [case.logits(), variant.target(case)]
        more: dict[str, Any] = {"gamma": gamma, "reduction": reduction}
        ours = values_and_gradients(variant.bind(F.focal_loss, case, **more), inputs)
        truth = oracle(inputs, **variant.arguments(case), **more)
        assert ours.keys() == truth.keys()
        for name, result in ours.items():
            assert result.shape == truth[name].shape
            assert error(result, truth[name]) < 1e-13, f"{name}, {reduction}"


# ---------------------------------------------------------------------------------------------
# Extreme logits, infinities, NaN, ignored rows

EXTREME = [20.0, -20.0, 100.0, -100.0, 1e4, -1e4]


@pytest.mark.special
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("gamma", GAMMAS)
@parametrize("logit", EXTREME)
@parametrize("classes", [2, 10, 37])
def test_extreme_logits(classes: int, logit: float, gamma: float, dtype: torch.dtype) -> None:
    """Value and gradient are finite and have every digit, as p tends to 0 and to 1."""
    input = torch.zeros(4, classes, dtype=dtype)
    input[:, 1] = logit
    input[2:] += torch.linspace(-1, 1, classes, dtype=dtype)
    target = torch.tensor([0, 1, 0, 1])
    ours = values_and_gradients(
        lambda x: F.focal_loss(x, target, gamma=gamma, reduction="none"), [input]
    )
    truth = oracle([input, target], gamma=gamma, reduction="none")
    for name, result in ours.items():
        assert result.isfinite().all(), name
        assert_elementwise(result, truth[name], name, dtype)


@pytest.mark.special
@parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@parametrize("gamma", GAMMAS)
@parametrize("logit", EXTREME)
@variants
def test_extreme_logits_in_every_variant(
    variant: Variant, logit: float, gamma: float, dtype: torch.dtype
) -> None:
    case = FocalCase("", (6, 5))
    inputs = [case.logits().to(dtype), variant.target(case)]
    inputs[0][:, 2] = logit
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    ours = values_and_gradients(variant.bind(F.focal_loss, case, dtype, gamma=gamma), inputs)
    arguments = variant.arguments(case)
    if arguments["weight"] is not None:
        arguments["weight"] = arguments["weight"].to(dtype).double()
    truth = oracle(inputs, gamma=gamma, **arguments)
    for name, result in ours.items():
        assert result.isfinite().all(), name
        assert error(result, truth[name]) <= 2 * TOLERANCES[dtype].bound, name


@pytest.mark.special
@parametrize("classes", [5, 100])
@parametrize("reduction", ["none", "sum"])
def test_nan_logits_of_a_class_without_weight(classes: int, reduction: str) -> None:
    """As in native, where 0 times NaN is NaN; a row that is ignored has no loss."""
    x = normal((3, classes)).float()
    x[0, 1] = x[1, 2] = float("nan")
    target, weight = torch.tensor([0, -100, 1]), torch.zeros(classes)
    for labels in (target, torch.eye(classes)[target.clamp(min=0)]):
        ours, theirs = (
            f(x, labels, weight, reduction=reduction)
            for f in (partial(F.focal_loss, gamma=0.0), native.cross_entropy)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.special
@parametrize("gamma", [0.0, 0.5, 2.0])
def test_masked_classes(gamma: float) -> None:
    """A logit of -inf takes its class out: no NaN, no gradient, and the rest as without it."""
    logits = normal((5, 4), 1)
    masked = torch.cat([logits, torch.full((5, 1), -float("inf"), dtype=torch.float64)], dim=1)
    target = torch.tensor([0, 1, 2, 3, 0])
    with_mask, without = (
        values_and_gradients(lambda x: F.focal_loss(x, target, gamma=gamma), [x])
        for x in (masked, logits)
    )
    torch.testing.assert_close(with_mask["value"], without["value"])
    torch.testing.assert_close(with_mask["gradient 0"][:, :4], without["gradient 0"])
    assert (with_mask["gradient 0"][:, 4] == 0).all()


@pytest.mark.native
@variants
@parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_classes_than_a_sum_has_in_one_part(dtype: torch.dtype, variant: Variant) -> None:
    """In float64 the measure itself, a sum of so many terms, is no better than ours."""
    case = FocalCase("20001_classes", (2, 20001))
    ours = variant.bind(F.focal_loss, case, dtype, gamma=0.0, reduction="sum")
    theirs = variant.bind(native.cross_entropy, case, dtype, reduction="sum")
    check_against_native(ours, theirs, [case.logits(), variant.target(case)], dtype)


@pytest.mark.layout
@parametrize("classes", [3, 40])
@parametrize("dtype", TOLERANCES)
def test_channels_last_3d(dtype: torch.dtype, classes: int) -> None:
    """As contiguous volumes."""
    logits = normal((2, classes, 3, 4, 5), 1).to(dtype)
    target = torch.arange(120).view(2, 3, 4, 5) % classes
    volume = logits.contiguous(memory_format=torch.channels_last_3d)
    plain, ours = (
        values_and_gradients(partial(F.focal_loss, target=target, reduction="none"), [x])
        for x in (logits, volume)
    )
    for name, result in ours.items():
        torch.testing.assert_close(result, plain[name], msg=name)


@pytest.mark.special
@parametrize("reduction", REDUCTIONS)
@parametrize("classes", [3, 40])
@parametrize("dtype", TOLERANCES)
@parametrize("special", [float("nan"), float("inf"), -float("inf")])
@parametrize("where", ["target", "other", "row"])
def test_special_logits_as_in_native(
    where: str, special: float, dtype: torch.dtype, classes: int, reduction: str
) -> None:
    logits, target = normal((4, classes), 1).to(dtype), torch.tensor([0, 1, 2, 1])
    logits[1, {"target": slice(1, 2), "other": slice(2, 3), "row": slice(None)}[where]] = special
    ours = F.focal_loss(logits, target, gamma=0.0, reduction=reduction)
    theirs = native.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.special
@parametrize("gamma", [0.0, 2.0])
@parametrize("ignore_index", [-100, 1])
def test_all_ignored(ignore_index: int, gamma: float) -> None:
    """As in native: the mean is NaN, the sum 0, every gradient 0."""
    logits = normal((3, 4), 1).requires_grad_()
    target = torch.full((3,), ignore_index)
    for reduction in REDUCTIONS:
        arguments: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
        ours = values_and_gradients(
            partial(F.focal_loss, target=target, gamma=gamma, **arguments), [logits]
        )
        theirs = values_and_gradients(
            partial(native.cross_entropy, target=target, **arguments), [logits]
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.native
@parametrize("target", [torch.tensor(2), torch.tensor([2])], ids=["()", "(1)"])
@parametrize("reduction", REDUCTIONS)
def test_a_single_row(reduction: str, target: Tensor) -> None:
    logits = normal((4,), 1)
    ours = F.focal_loss(logits, target, gamma=0.0, reduction=reduction)
    theirs = native.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.native
def test_byte_targets() -> None:
    logits, target = normal((5, 4), 1), torch.tensor([0, 3, 2, 1, 0], dtype=torch.uint8)
    ours, theirs = F.focal_loss(logits, target, gamma=0.0), native.cross_entropy(logits, target)
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------
# Layouts, kernels, determinism


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
@variants
def test_layout(layout: str, variant: Variant) -> None:
    case = FocalCase("", (3, 5, 4, 6))
    logits = LAYOUTS[layout](case.logits())
    target = variant.target(case)
    target = LAYOUTS[layout](target) if layout != "channels_last_slice" else target
    for reduction in REDUCTIONS:
        loss = variant.bind(F.focal_loss, case, gamma=2.0, reduction=reduction)
        strided = values_and_gradients(loss, [logits, target])
        plain = values_and_gradients(loss, [logits.contiguous(), target.contiguous()])
        for name, result in strided.items():
            assert error(result, plain[name]) < 1e-14, name
        if reduction == "none":
            check_same_layout(strided["value"], plain["value"], "value")


@pytest.mark.layout
@parametrize("layout", ["sliced", "transposed", "expanded"])
def test_layout_of_rows(layout: str) -> None:
    logits, target = LAYOUTS[layout](normal((7, 5), 1)), torch.arange(14)[::2] % 5
    weight = torch.arange(1.0, 11, dtype=torch.float64)[::2]
    ours = F.focal_loss(logits, target, weight, gamma=0.0)
    torch.testing.assert_close(ours, native.cross_entropy(logits, target, weight))


@pytest.mark.native
@variants
def test_runs_our_kernels(variant: Variant) -> None:
    case = FocalCase("", (4, 5, 3))
    for gamma in (0.0, 2.0):
        loss = variant.bind(F.focal_loss, case, gamma=gamma)
        check_runs_ours(loss, [case.logits(), variant.target(case)], "focal_loss")


@pytest.mark.determinism
@variants
@parametrize("reduction", REDUCTIONS)
@parametrize("dtype", DTYPES, ids=ids)
def test_same_bits_on_every_run_and_thread_count(
    dtype: torch.dtype, reduction: str, variant: Variant
) -> None:
    case = FocalCase("", (10007, 11))
    inputs = cast([case.logits(), variant.target(case)], dtype)
    loss = variant.bind(F.focal_loss, case, dtype, gamma=2.0, reduction=reduction)
    results = []
    for count in (2, 1, 2):
        with threads(count):
            results.append(values_and_gradients(loss, inputs))
    check_same_bits(results)


# ---------------------------------------------------------------------------------------------
# Class-balanced weights


@pytest.mark.oracle
@parametrize("beta", [0.0, 0.9, 0.99, 0.9999, 1 - 1e-12])
@parametrize("counts", [[5], [1, 1, 1], [1, 10, 1000], [3, 10**6, 10**12], [2.5, 7.0]], ids=str)
def test_class_balanced_weight(counts: list[float], beta: float) -> None:
    truth = torch.from_numpy(reference.class_balanced_weight(counts, beta))
    for given in (counts, torch.tensor(counts)):
        ours = F.class_balanced_weight(given, beta)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
        assert ours.sum().item() == pytest.approx(len(counts), rel=1e-6)


@pytest.mark.oracle
def test_class_balanced_weight_by_hand() -> None:
    """Effective numbers at beta = 1/2: 1 sample counts 1, 2 count 3/2."""
    ours = F.class_balanced_weight([1, 2], beta=0.5)
    torch.testing.assert_close(ours, torch.tensor([6 / 5, 4 / 5]))
