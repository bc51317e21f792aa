"""Errors of every op and dtype beside native's, over random and adversarial inputs.

The truth is computed in the x87's 80-bit numbers (numpy's longdouble, 64 bits of digits) by
formulas that lose none: enough to judge float64 too. test_reference.py compares such formulas with
mpmath. Where a result is a sum, errors are relative to the sum of its terms' magnitudes, which is
what rounding is proportional to: terms that cancel would otherwise favour one order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import native
import numpy as np
import torch
from checks import cast, generator, normal, values_and_gradients
from tolerances import Errors, comparable
from torch import Tensor

import dlops.functional as F

Exact = Any  # an array of numpy.longdouble
Truth = Callable[..., dict[str, Exact]]


class Problem(NamedTuple):
    op: str
    inputs_of: str
    """What is adversarial about the inputs."""
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    truth: Truth
    """Of grad_output and the inputs: what values_and_gradients gives."""
    inputs: list[Tensor]
    is_sum: bool = False
    """Each result is a sum of products of the arguments."""

    @property
    def id(self) -> str:
        return f"{self.op}, {self.inputs_of}"


def exact(x: Tensor) -> Exact:
    return comparable(x).numpy().astype(np.longdouble)


def errors(result: Tensor, truth: Exact, magnitude: Exact) -> Errors:
    info = torch.finfo(result.dtype)
    with np.errstate(invalid="ignore"):
        deviation = np.abs(exact(result) - truth)
    if not np.isfinite(deviation).all():
        return Errors(np.inf, np.inf)
    unit = max(np.abs(magnitude).max(), info.smallest_normal) * info.eps
    return Errors(float(deviation.max() / unit), float(np.sqrt((deviation**2).mean()) / unit))


def measure(problem: Problem, dtype: torch.dtype) -> Iterator[tuple[str, Errors, Errors]]:
    """The name of each result, our errors and native's."""
    inputs = cast(problem.inputs, dtype)
    ours = values_and_gradients(problem.ours, inputs)
    theirs = values_and_gradients(problem.theirs, inputs)
    grad_output = normal(ours["value"].shape, 99).to(dtype)
    arrays = [exact(grad_output)]
    arrays += [exact(x) if x.is_floating_point() else x.numpy() for x in inputs]
    truth = magnitude = problem.truth(*arrays)
    if problem.is_sum:
        magnitude = problem.truth(*map(np.abs, arrays))
    for name, result in ours.items():
        against = truth[name], magnitude[name]
        yield name, errors(result, *against), errors(theirs[name], *against)


# ---------------------------------------------------------------------------------------------
# Truths


def windows(x: Exact, kernel: tuple[int, int], padding: int) -> Exact:
    """(N, C, OH, OW, R, S)"""
    margins = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, margins), kernel, axis=(2, 3))


def conv2d_truth(
    grad: Exact, x: Exact, w: Exact, b: Exact, padding: int, groups: int = 1
) -> dict[str, Exact]:
    parts = []
    for xg, wg, gg in zip(
        np.split(x, groups, 1), np.split(w, groups), np.split(grad, groups, 1), strict=True
    ):
        seen = windows(xg, w.shape[2:], padding)
        turned = windows(gg, w.shape[2:], w.shape[2] - 1 - padding)
        parts.append(
            (
                np.einsum("nchwrs,ocrs->nohw", seen, wg),
                np.einsum("nohwrs,ocrs->nchw", turned, wg[..., ::-1, ::-1]),
                np.einsum("nchwrs,nohw->ocrs", seen, gg),
            )
        )
    value, by_input, by_weight = (
        np.concatenate(same, axis)
        for same, axis in zip(zip(*parts, strict=True), (1, 1, 0), strict=True)
    )
    return {
        "value": value + b[:, None, None],
        "gradient 0": by_input,
        "gradient 1": by_weight,
        "gradient 2": grad.sum((0, 2, 3)),
    }


def max_pool2d_truth(grad: Exact, x: Exact, kernel: int) -> dict[str, Exact]:
    """Stride 1: windows overlap, and an input's gradient is a sum."""
    flat = windows(x, (kernel, kernel), 0).reshape(*grad.shape, -1)
    cell = flat.argmax(-1)
    n, c, h, w = np.indices(grad.shape)
    result = np.zeros_like(x)
    np.add.at(result, (n, c, h + cell // kernel, w + cell % kernel), grad)
    return {"value": flat.max(-1), "gradient 0": result}


def unfold_truth(grad: Exact, x: Exact, kernel: int) -> dict[str, Exact]:
    seen = windows(x, (kernel, kernel), 0)
    value = seen.transpose(0, 1, 4, 5, 2, 3).reshape(grad.shape)
    return {"value": value, "gradient 0": folded(grad, x.shape, kernel)}


def folded(columns: Exact, size: tuple[int, ...], kernel: int) -> Exact:
    n, c, height, width = size
    rows, cols = height - kernel + 1, width - kernel + 1
    columns = columns.reshape(n, c, kernel, kernel, rows, cols)
    result = np.zeros(size, np.longdouble)
    for r in range(kernel):
        for s in range(kernel):
            result[..., r : r + rows, s : s + cols] += columns[:, :, r, s]
    return result


def fold_truth(grad: Exact, columns: Exact, size: tuple[int, int], kernel: int) -> dict[str, Exact]:
    seen = windows(grad, (kernel, kernel), 0).transpose(0, 1, 4, 5, 2, 3)
    value = folded(columns, grad.shape, kernel)
    return {"value": value, "gradient 0": seen.reshape(columns.shape)}


def sigmoid_truth(
    grad: Exact, x: Exact, t: Exact, gamma: float, alpha: float = 0.25
) -> dict[str, Exact]:
    """An 80-bit number has 15 bits of exponent: nothing under- or overflows."""
    p, not_p = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    ce = t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)
    q = p * (1 - t) + not_p * t
    w, power = alpha * t + (1 - alpha) * (1 - t), q**gamma
    slope = p * (1 - t) - not_p * t + gamma * ce * (1 - 2 * t) * p * not_p / q
    by_target = (2 * alpha - 1) * power * ce + w * power * (-x + gamma * (not_p - p) * ce / q)
    return {
        "value": w * power * ce,
        "gradient 0": grad * w * power * slope,
        "gradient 1": grad * by_target,
    }


def softmax_truth(grad: Exact, x: Exact, labels: Any, gamma: float) -> dict[str, Exact]:
    rows = np.arange(len(x))
    top = x.argmax(1)
    shifted = np.exp(x - x[rows, top, None])
    others = shifted.copy()
    others[rows, top] = 0
    total = others.sum(1)
    log_p = x - x[rows, top, None] - np.log1p(total)[:, None]
    p = np.exp(log_p)
    not_p = np.where(np.arange(x.shape[1]) == top[:, None], (total / (1 + total))[:, None], 1 - p)
    v, rest = log_p[rows, labels], not_p[rows, labels]
    ratio = np.where(rest > 0, -v / np.where(rest > 0, rest, 1), 1)
    phi = -(rest**gamma) * (1 + gamma * p[rows, labels] * ratio)
    slope = -p
    slope[rows, labels] = rest
    return {
        "value": -(rest**gamma) * v,
        "gradient 0": (grad * phi)[:, None] * slope,
    }


# ---------------------------------------------------------------------------------------------
# Problems


def cancelling(input: tuple[int, ...], weight: tuple[int, ...]) -> list[Tensor]:
    """Sums of which all but a thousandth cancels: half of the channels undo the other half."""
    x, w = normal(input, 1), normal(weight, 2)
    half = input[1] // 2
    x[:, half:] = x[:, :half] * (1 + 1e-3 * normal((input[0], half, *input[2:]), 3))
    w[:, half:] = -w[:, :half]
    return [x, w, torch.zeros(weight[0], dtype=torch.float64)]


def conv2d_problems(dtype: torch.dtype) -> Iterator[Problem]:
    tiny = torch.finfo(dtype).smallest_normal
    for shape, x, w, padding, groups in (
        ("3x3", (2, 16, 9, 11), (8, 16, 3, 3), 1, 1),
        ("deep", (1, 256, 5, 4), (6, 256, 3, 3), 1, 1),
        ("winograd", (2, 64, 9, 8), (48, 64, 3, 3), 1, 1),
        ("wide winograd", (1, 128, 10, 10), (128, 128, 3, 3), 1, 1),
        ("widest winograd", (1, 256, 14, 14), (256, 256, 3, 3), 1, 1),
        ("1x1", (2, 96, 6, 7), (20, 96, 1, 1), 0, 1),
        ("depthwise", (2, 12, 10, 9), (12, 1, 3, 3), 1, 12),
    ):
        arguments = {"padding": padding, "groups": groups}
        bind = partial(
            Problem,
            ours=partial(F.conv2d, **arguments),
            theirs=partial(native.conv2d, **arguments),
            truth=partial(conv2d_truth, **arguments),
            is_sum=True,
        )
        plain = [normal(x, 1), normal(w, 2), normal(w[:1], 3)]
        op = f"conv2d {shape}"
        yield bind(op, "normal", inputs=plain)
        # Every sign alike: the sum's own rounding is the error.
        yield bind(op, "positive", inputs=[t.abs() for t in plain])
        if groups == 1:
            yield bind(op, "cancellation", inputs=cancelling(x, w))
        yield bind(op, "denormal input", inputs=[plain[0] * tiny / 4, plain[1], plain[2] * tiny])


def window_problems(dtype: torch.dtype) -> Iterator[Problem]:
    tiny = torch.finfo(dtype).smallest_normal
    size, columns = (2, 5, 9, 12), (2, 20, 88)
    pooling = {"kernel_size": 3, "stride": 1}
    for name, scale in (("normal", 1.0), ("denormal", tiny / 4)):
        # Rounded before it is scaled, so that no two elements become equal.
        x = torch.randperm(2 * 5 * 9 * 12, generator=generator(1)).reshape(size) - 500.0
        yield Problem(
            "max_pool2d",
            name,
            partial(F.max_pool2d, **pooling),
            partial(native.max_pool2d, **pooling),
            partial(max_pool2d_truth, kernel=3),
            [x.double() / (64 if scale < 1 else 1) * (2 * scale if scale < 1 else 1)],
        )
        yield Problem(
            "unfold",
            name,
            partial(F.unfold, kernel_size=2),
            partial(native.unfold, kernel_size=2),
            partial(unfold_truth, kernel=2),
            [normal(size, 1) * scale],
        )
        fold = {"output_size": (9, 12), "kernel_size": 2}
        yield Problem(
            "fold",
            name,
            partial(F.fold, **fold),
            partial(native.fold, **fold),
            partial(fold_truth, size=(9, 12), kernel=2),
            [normal(columns, 1) * scale],
        )


GAMMAS = (0.0, 0.5, 2.0, 3.7)


def logits_of(dtype: torch.dtype, size: tuple[int, int]) -> dict[str, Tensor]:
    tiny = torch.finfo(dtype).smallest_normal
    certain = normal(size, 1)
    certain[:, 0] += 12
    return {
        "normal": 2 * normal(size, 1),
        "large logits": 80 * normal(size, 1),
        "huge logits": 1000 * normal(size, 1),
        "certain": certain,
        "denormal": normal(size, 1) * tiny / 4,
    }


def focal_problems(dtype: torch.dtype) -> Iterator[Problem]:
    for gamma in GAMMAS:
        for classes in (10, 300):
            size = (40, classes)
            labels = torch.randint(classes, size[:1], generator=generator(2))
            labels[::2] = 0
            for name, logits in logits_of(dtype, size).items():
                more = {"gamma": gamma, "reduction": "none"}
                theirs = (
                    partial(native.cross_entropy, reduction="none")
                    if gamma == 0
                    else partial(native.focal_loss, **more)
                )
                yield Problem(
                    f"focal_loss gamma={gamma:g}, {classes} classes",
                    name,
                    partial(F.focal_loss, **more),
                    theirs,
                    partial(softmax_truth, gamma=gamma),
                    [logits, labels],
                )
        hits = (torch.rand((40, 50), generator=generator(2)) < 0.3).double()
        soft = torch.rand((40, 50), generator=generator(2), dtype=torch.float64)
        for name, logits in logits_of(dtype, (40, 50)).items():
            op = f"sigmoid_focal_loss gamma={gamma:g}"
            ours, theirs = (
                partial(library.sigmoid_focal_loss, gamma=gamma) for library in (F, native)
            )
            truth = partial(sigmoid_truth, gamma=gamma)
            yield Problem(f"{op}, soft targets", name, ours, theirs, truth, [logits, soft])
            # Targets of 0 and 1 have kernels of their own, where they need no gradient.
            yield Problem(
                f"{op}, hard targets",
                name,
                partial(with_targets, ours, hits),
                partial(with_targets, theirs, hits),
                partial(with_exact_targets, truth, exact(hits)),
                [logits],
            )


def with_targets(loss: Callable[..., Tensor], targets: Tensor, x: Tensor) -> Tensor:
    return loss(x, targets.to(x))


def with_exact_targets(truth: Truth, targets: Exact, grad: Exact, x: Exact) -> dict[str, Exact]:
    return truth(grad, x, targets)


def problems(dtype: torch.dtype) -> Iterator[Problem]:
    yield from conv2d_problems(dtype)
    yield from window_problems(dtype)
    yield from focal_problems(dtype)
