"""Every op with its native counterpart and the inputs of the named cases, for any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import native
import torch
from cases import (
    CONV2D,
    FOCAL,
    LARGE_MAX_POOL2D,
    MAX_POOL2D,
    SMALL_CONV2D,
    SMALL_FOCAL,
    UNFOLD,
    Conv2dCase,
    FocalCase,
    MaxPool2dCase,
    UnfoldCase,
)
from checks import Fill, Inputs, normal
from test_focal_loss import VARIANTS, Variant

import dlops.functional as F

REDUCTIONS = ["none", "mean", "sum"]


class Problem(NamedTuple):
    """`ours` and `native` are functions of `inputs` alone."""

    id: str
    ours: Any
    native: Any
    build: Callable[[], Inputs]
    small: bool = True  # enough to be differentiated numerically

    @property
    def inputs(self) -> Inputs:
        """Float64 tensors and class indices, on the CPU."""
        return self.build()


def conv2d(case: Conv2dCase, fill: Fill = normal) -> Problem:
    ours, theirs = (partial(f, **case.arguments()) for f in (F.conv2d, native.conv2d))
    return Problem(
        f"conv2d {case.id}", ours, theirs, lambda: case.tensors(fill), case in SMALL_CONV2D
    )


def unfold(case: UnfoldCase, fill: Fill = normal) -> Problem:
    ours, theirs = (partial(f, **case.arguments()) for f in (F.unfold, native.unfold))
    return Problem(f"unfold {case.id}", ours, theirs, lambda: [case.image(fill)])


def fold(case: UnfoldCase, fill: Fill = normal) -> Problem:
    arguments = {"output_size": case.input[-2:], **case.arguments()}
    ours, theirs = (partial(f, **arguments) for f in (F.fold, native.fold))
    return Problem(f"fold {case.id}", ours, theirs, lambda: [case.columns(fill)])


def max_pool2d(case: MaxPool2dCase, **fill: Fill) -> Problem:
    ours, theirs = (partial(f, **case.arguments()) for f in (F.max_pool2d, native.max_pool2d))
    return Problem(
        f"max_pool2d {case.id}", ours, theirs, lambda: [case.tensor(**fill)], case in MAX_POOL2D
    )


def sigmoid_focal_loss(case: FocalCase, soft: bool, **arguments: Any) -> Problem:
    ours, theirs = (
        partial(f, **arguments) for f in (F.sigmoid_focal_loss, native.sigmoid_focal_loss)
    )
    targets = case.soft_targets if soft else case.hard_targets
    name = f"sigmoid_focal_loss {case.id} {'soft' if soft else 'hard'} {arguments}"
    return Problem(name, ours, theirs, lambda: [case.logits(), targets()], case in SMALL_FOCAL)


def focal_loss(case: FocalCase, variant: Variant, **arguments: Any) -> Problem:
    native_arguments = dict(arguments)
    if native_arguments["gamma"] == 0:
        del native_arguments["gamma"]
        formula = native.cross_entropy
    else:
        formula = native.focal_loss
    # Weights that every dtype can hold.
    ours, theirs = (
        variant.bind(f, case, torch.bfloat16, **more)
        for f, more in ((F.focal_loss, arguments), (formula, native_arguments))
    )
    name = f"focal_loss {case.id} {variant.id} {arguments}"

    def build() -> Inputs:
        return [case.logits(), variant.target(case)]

    return Problem(name, ours, theirs, build, case in SMALL_FOCAL)


def images(fill: Fill = normal) -> Iterator[Problem]:
    """The ops that move and multiply-add: exact on small integers."""
    yield from (conv2d(case, fill) for case in CONV2D)
    yield from (op(case, fill) for op in (unfold, fold) for case in UNFOLD)


def pooling(**fill: Fill) -> Iterator[Problem]:
    yield from (max_pool2d(case, **fill) for case in MAX_POOL2D + LARGE_MAX_POOL2D)


def losses() -> Iterator[Problem]:
    """Each case with every kind of target; gamma and reduction go round."""
    for i, case in enumerate(FOCAL):
        for j, soft in enumerate((False, True)):
            gamma, reduction = (0.5, 2.0, 3.7)[(i + j) % 3], REDUCTIONS[(i + j) % 3]
            yield sigmoid_focal_loss(case, soft, gamma=gamma, reduction=reduction)
        for j, variant in enumerate(VARIANTS):
            # One class has p = 1, where the gradient of the native formula is NaN.
            gamma = 0.0 if case.classes == 1 else (0.0, 1.0, 2.0, 3.7)[(i + j) % 4]
            yield focal_loss(case, variant, gamma=gamma, reduction=REDUCTIONS[(i + j) % 3])


PROBLEMS = [*images(), *pooling(), *losses()]
