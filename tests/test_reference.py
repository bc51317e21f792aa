"""The oracles themselves: the NumPy loops against native, focal loss against exact numbers."""

from __future__ import annotations

from typing import Any

import mpmath  # type: ignore[import-untyped]
import native
import numpy as np
import pytest
import torch
from cases import (
    FOCAL,
    MAX_POOL2D,
    SMALL_CONV2D,
    SMALL_FOCAL,
    UNFOLD,
    Conv2dCase,
    FocalCase,
    MaxPool2dCase,
    UnfoldCase,
    ids,
)
from checks import normal
from torch import Tensor

from dlops import reference

pytestmark = pytest.mark.oracle


def close(ours: Any, truth: Tensor) -> None:
    assert tuple(ours.shape) == tuple(truth.shape)
    np.testing.assert_allclose(ours, truth.detach().numpy(), rtol=1e-10, atol=1e-12)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
    grad_output = normal(output.shape, 5)
    return grad_output.numpy(), list(torch.autograd.grad(output, inputs, grad_output))


batched = [case for case in SMALL_CONV2D if len(case.input) == 4]


@pytest.mark.parametrize("case", batched, ids=ids)
def test_conv2d(case: Conv2dCase) -> None:
    tensors = [x for x in case.tensors() if x is not None]
    arrays: list[Any] = [x.numpy() for x in tensors]
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = native.conv2d(*leaves, **case.arguments())
    close(reference.conv2d(*arrays, **case.arguments()), output)
    grad_output, expected = gradients(output, leaves)
    ours = reference.conv2d_backward(grad_output, *arrays[:2], **case.arguments())
    for one, other in zip(ours, expected, strict=False):  # no bias, no gradient for it
        close(one, other)


@pytest.mark.parametrize("case", [case for case in UNFOLD if len(case.input) == 4], ids=ids)
def test_unfold_and_fold(case: UnfoldCase) -> None:
    image, columns, size = case.image(), case.columns(), case.input[2:]
    close(
        reference.unfold(image.numpy(), **case.arguments()),
        native.unfold(image, **case.arguments()),
    )
    close(
        reference.fold(columns.numpy(), size, **case.arguments()),
        native.fold(columns, size, **case.arguments()),
    )


@pytest.mark.parametrize("case", [case for case in MAX_POOL2D if len(case.input) == 4], ids=ids)
def test_max_pool2d(case: MaxPool2dCase) -> None:
    # Few distinct values: ties decide where the gradient goes.
    leaf = case.tensor(normal).mul(2).round().requires_grad_()
    values, indices = native.max_pool2d(leaf, **case.arguments(), return_indices=True)
    ours, our_indices = reference.max_pool2d(leaf.detach().numpy(), **case.arguments())
    close(ours, values)
    close(our_indices, indices)
    grad_output, (expected,) = gradients(values, [leaf])
    close(reference.max_pool2d_backward(grad_output, our_indices, leaf.shape), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", SMALL_FOCAL, ids=ids)
def test_focal_loss_gamma_0_is_cross_entropy(
    case: FocalCase, label_smoothing: float, reduction: str
) -> None:
    arguments: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    for target in (case.indices(ignored=True), case.probabilities()):
        logits, weight = case.logits().requires_grad_(), case.weight()
        leaf = target.clone().requires_grad_(target.is_floating_point())
        output = native.cross_entropy(logits, leaf, weight, **arguments)
        arrays: list[Any] = [x.detach().numpy() for x in (logits, target, weight)]
        arrays.append(0.0)  # gamma
        close(reference.focal_loss(*arrays, **arguments), output)
        inputs = [x for x in (logits, leaf) if x.requires_grad]
        grad_output, expected = gradients(output, inputs)
        ours = reference.focal_loss_backward(grad_output, *arrays, **arguments)
        for one, other in zip(ours, expected, strict=False):
            close(one, other)


@pytest.mark.parametrize("alpha", [0.25, -1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("case", FOCAL[:3], ids=ids)
def test_sigmoid_focal_loss(case: FocalCase, gamma: float, alpha: float) -> None:
    inputs, targets = case.logits().requires_grad_(), case.soft_targets().requires_grad_()
    output = native.sigmoid_focal_loss(inputs, targets, alpha, gamma, "mean")
    arrays = inputs.detach().numpy(), targets.detach().numpy()
    close(reference.sigmoid_focal_loss(*arrays, alpha, gamma, "mean"), output)
    grad_output, expected = gradients(output, [inputs, targets])
    ours = reference.sigmoid_focal_loss_backward(grad_output, *arrays, alpha, gamma, "mean")
    for one, other in zip(ours, expected, strict=True):
        close(one, other)


EXTREME = [0.0, 0.5, -3.0, 20.0, -20.0, 100.0, -100.0, 700.0, -700.0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("logit", EXTREME)
def test_focal_losses_have_every_digit(logit: float, gamma: float) -> None:
    """Two classes with logits (x, 0) are the sigmoid of x: both oracles meet one exact number."""
    with mpmath.workdps(700):
        wrong = 1 / (1 + mpmath.exp(mpmath.mpf(logit)))
        right = 1 - wrong
        loss = -(wrong**gamma) * mpmath.log(right)
        # d/dx: dp/dx = p (1 - p), of -(1 - p)^gamma log p.
        slope = gamma * wrong**gamma * right * mpmath.log(right) - wrong ** (gamma + 1)
    sigmoid = reference.sigmoid_focal_loss([logit], [1.0], -1, gamma)
    sigmoid_slope, _ = reference.sigmoid_focal_loss_backward([1.0], [logit], [1.0], -1, gamma)
    softmax = reference.focal_loss([logit, 0.0], np.array(0), gamma=gamma)
    softmax_slope, _ = reference.focal_loss_backward(1.0, [logit, 0.0], np.array(0), gamma=gamma)
    for ours, truth in (
        (sigmoid, loss),
        (softmax, loss),
        (sigmoid_slope, slope),
        (softmax_slope[:1], slope),
    ):
        np.testing.assert_allclose(ours, float(truth), rtol=1e-12, atol=1e-300)


def test_class_balanced_weight() -> None:
    counts = np.array([1, 10, 1000, 10**9])
    weights = reference.class_balanced_weight(counts, 0.99)
    direct = np.array([(1 - 0.99) / (1 - 0.99 ** float(n)) for n in counts])
    np.testing.assert_allclose(weights, direct * 4 / direct.sum(), rtol=1e-12)
    np.testing.assert_array_equal(reference.class_balanced_weight(counts, 0.0), np.ones(4))
