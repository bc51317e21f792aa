"""torch.library.opcheck, with all its default tests, on every raw operator."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from checks import normal

import dlops  # noqa: F401  (registers the operators)

pytestmark = [
    pytest.mark.opcheck,
    # torch only warns where a gradient gets lost.
    pytest.mark.filterwarnings("error:.*an autograd kernel was not registered"),
]

ops = torch.ops.dlops


def leaf(*size: int, seed: int = 0) -> torch.Tensor:
    return normal(size, seed).requires_grad_()


def constants(*arguments: Any) -> tuple[Any, ...]:
    """For what has no derivative: the losses' second ones, and values with gradients."""
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)


class Sample(NamedTuple):
    op: str
    arguments: tuple[Any, ...]


# stride, padding (top, left, bottom, right), dilation, groups
GEOMETRIES = [([1, 1], [1, 1, 1, 1], [1, 1], 1), ([2, 1], [1, 0, 2, 1], [1, 2], 2)]


def conv2d_samples() -> list[Sample]:
    samples = []
    for stride, padding, dilation, groups in GEOMETRIES:
        geometry = (stride, padding, dilation, groups)
        input, weight, bias = leaf(2, 4, 7, 8), leaf(6, 4 // groups, 3, 2), leaf(6)
        output = ops.conv2d(input, weight, bias, *geometry)
        grad_output = normal(output.shape).requires_grad_()
        sizes = (list(input.shape), list(weight.shape[2:]))
        last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        samples += [
            Sample("conv2d", (input, weight, bias, *geometry)),
            Sample("conv2d", (input, weight, None, *geometry)),
            Sample("conv2d", (last, weight, bias, *geometry)),
            Sample("conv2d", (input.detach().float(), weight.detach().float(), None, *geometry)),
            Sample("conv2d_grad_input", (grad_output, weight, list(input.shape), *geometry)),
            Sample("conv2d_grad_weight", (grad_output, input, [3, 2], *geometry)),
            Sample("conv2d_grad_weight", (grad_output, last, [3, 2], *geometry)),
            Sample("conv2d_grad_bias", (grad_output,)),
            Sample("conv2d_backward", (grad_output, input, weight, *sizes, *geometry, [True] * 3)),
            Sample(
                "conv2d_backward",
                (grad_output, None, weight, *sizes, *geometry, [True, False, True]),
            ),
        ]
    return samples


def unfold_samples() -> list[Sample]:
    window = ([3, 2], [1, 2], [1, 0], [2, 1])
    columns = ops.unfold(normal((2, 3, 7, 6)), *window)
    return [
        Sample("unfold", (leaf(2, 3, 7, 6), *window)),
        Sample("fold", (leaf(*columns.shape), [7, 6], *window)),
    ]


def max_pool2d_samples() -> list[Sample]:
    samples = []
    for kernel_size, ceil_mode in (([3, 2], True), ([17, 17], False)):
        window = (kernel_size, [2, 1], [1, 0], [1, 1])
        for input in (leaf(2, 3, 18, 19), leaf(2, 18, 19, 3).permute(0, 3, 1, 2)):
            x = input.detach().requires_grad_()
            output, cells = (t.detach() for t in ops.max_pool2d(x, *window, ceil_mode))
            size = list(x.shape)
            grad_output = output.clone().requires_grad_()
            samples += [
                Sample("max_pool2d", (x, *window, ceil_mode)),
                Sample("max_pool2d_values", (x, *window, ceil_mode)),
                Sample("max_pool2d_indices", (cells, size, *window)),
                Sample("max_pool2d_scatter", (grad_output, cells, size, *window)),
                Sample("max_pool2d_gather", (x, cells, *window)),
            ]
    return samples


def sigmoid_samples() -> list[Sample]:
    samples = []
    mask = [True, True]
    turned = normal((5, 4)).t().requires_grad_()
    alpha = normal((5,)).abs()
    settings = [(0, None, leaf(4, 5)), (1, None, leaf(4, 5)), (2, alpha, leaf(4, 5))]
    settings += [(0, None, turned), (0, alpha, turned), (1, None, turned)]
    for reduction, class_alpha, inputs in settings:
        targets = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
        call = (inputs, targets, class_alpha, 0.25, 2.0, reduction)
        grad_output = torch.ones_like(ops.sigmoid_focal_loss(*call)).detach().requires_grad_()
        tangents = (leaf(4, 5, seed=3), leaf(4, 5, seed=4))
        samples += [
            Sample("sigmoid_focal_loss", call),
            Sample("sigmoid_focal_loss_and_grad", constants(*call)),
            Sample(
                "sigmoid_focal_loss_scale_grad", constants(inputs.clone(), grad_output * 2, *call)
            ),
            Sample("sigmoid_focal_loss_vjp", (grad_output, *call, mask)),
            Sample("sigmoid_focal_loss_vjp", (grad_output, *call, [True, False])),
            Sample("sigmoid_focal_loss_jvp", (*tangents, *call)),
            Sample("sigmoid_focal_loss_hvp", constants(grad_output, *tangents, *call, mask)),
        ]
    return samples


def focal_samples() -> list[Sample]:
    samples = []
    indices = torch.tensor([[0, 1, -100], [4, 3, 2]])
    probabilities = normal((2, 5, 3)).softmax(1).requires_grad_()
    for target in (indices, probabilities):
        tangent = leaf(2, 5, 3, seed=4) if target.is_floating_point() else None
        mask = [True, target.is_floating_point()]
        turned = normal((3, 5, 2)).permute(2, 1, 0).requires_grad_()
        settings = [(0, None, leaf(2, 5, 3)), (1, normal((5,)).abs(), leaf(2, 5, 3))]
        settings += [(2, None, leaf(2, 5, 3)), (0, None, turned), (1, None, turned)]
        for reduction, weight, logits in settings:
            call = (logits, target, weight, 2.0, -100, reduction, 0.1)
            loss, normalizer = (x.detach() for x in ops.focal_loss(*call))
            grad_output = torch.ones_like(loss).requires_grad_()
            tangents = (leaf(2, 5, 3, seed=3), tangent)
            samples += [
                Sample("focal_loss", call),
                Sample("focal_loss_and_grad", constants(*call)),
                Sample(
                    "focal_loss_scale_grad",
                    constants(logits.clone(), grad_output * 2, normalizer, *call),
                ),
                Sample("focal_loss_vjp", (grad_output, normalizer, *call, mask)),
                Sample("focal_loss_jvp", (normalizer, *tangents, *call)),
                Sample(
                    "focal_loss_hvp", constants(grad_output, normalizer, *tangents, *call, mask)
                ),
            ]
    return samples


MAKERS = [conv2d_samples, unfold_samples, max_pool2d_samples, sigmoid_samples, focal_samples]
OPERATORS = sorted(
    name.removeprefix("dlops::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("dlops::")
)


@cache
def samples() -> list[Sample]:
    return [sample for make in MAKERS for sample in make()]


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op: str) -> None:
    mine = [sample for sample in samples() if sample.op == op]
    assert mine, f"no sample calls torch.ops.dlops.{op}"
    for sample in mine:
        torch.library.opcheck(getattr(ops, op).default, sample.arguments)
