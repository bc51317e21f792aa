"""Accepted and refused alike: every dtype of torch, every empty size, against the native op.

Where both accept, shape, dtype and values agree, and those of the gradients; where native refuses,
so does dlops, with the same type of exception or a more specific one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import native
import pytest
import torch
from torch import Tensor

import dlops.functional as F

pytestmark = [pytest.mark.invalid, pytest.mark.filterwarnings("ignore::UserWarning")]
parametrize = pytest.mark.parametrize

NATIVE = SimpleNamespace(**{**vars(native), "focal_loss": native.cross_entropy})
OURS = SimpleNamespace(
    **{
        **vars(F),
        "focal_loss": lambda *args, **options: F.focal_loss(*args, gamma=0.0, **options),
    }
)


def outcome(function: Callable[..., Any], leaves: list[Tensor]) -> Any:
    """The outputs and gradients, or the exception."""
    leaves = [x.clone() for x in leaves]
    for x in leaves:
        x.requires_grad_(x.is_floating_point() or x.is_complex())
    try:
        result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        grads: tuple[Tensor | None, ...] = ()
        if outputs[0].requires_grad:
            wanted = [x for x in leaves if x.requires_grad]
            total = torch.view_as_real(outputs[0]) if outputs[0].is_complex() else outputs[0]
            grads = torch.autograd.grad(total.sum(), wanted, allow_unused=True)
    except Exception as error:
        return error
    return [x.detach() if x is not None else None for x in (*outputs, *grads)]


def check_alike(call: Callable[..., Any], leaves: list[Tensor], values: bool = True) -> None:
    ours, theirs = (
        outcome(lambda *x: call(OURS, *x), leaves),
        outcome(lambda *x: call(NATIVE, *x), leaves),
    )
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"native: {theirs!r}, ours: {ours!r}"
        return
    assert not isinstance(ours, Exception), f"native gives {theirs}, ours: {ours!r}"
    if not values:
        ours, theirs = ([x.shape for x in xs if x is not None] for xs in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True)


# ---------------------------------------------------------------------------------------- dtypes


def holds_numbers(dtype: torch.dtype) -> bool:
    """Not so the quantized dtypes, bits and whatever has no conversion."""
    try:
        torch.ones(2).to(dtype).clone()
    except (RuntimeError, TypeError):
        return False
    return True


DTYPES = sorted(
    filter(holds_numbers, {d for d in vars(torch).values() if isinstance(d, torch.dtype)}), key=str
)
LABELS = torch.tensor([0, 1, 2])


def ones(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones(size).to(dtype)


CALLS: dict[str, Callable[[Any, torch.dtype], tuple[Callable[..., Any], list[Tensor]]]] = {
    "conv2d": lambda o, d: (o.conv2d, [ones((1, 2, 4, 4), d), ones((2, 2, 3, 3), d)]),
    "conv2d with bias": lambda o, d: (
        o.conv2d,
        [ones((1, 2, 4, 4), d), ones((2, 2, 3, 3), d), ones((2,), d)],
    ),
    "max_pool2d": lambda o, d: (lambda x: o.max_pool2d(x, 2), [ones((1, 2, 4, 4), d)]),
    "max_pool2d with indices": lambda o, d: (
        lambda x: o.max_pool2d(x, 2, return_indices=True),
        [ones((1, 2, 4, 4), d)],
    ),
    "unfold": lambda o, d: (lambda x: o.unfold(x, 2), [ones((1, 2, 4, 4), d)]),
    "fold": lambda o, d: (lambda x: o.fold(x, (4, 4), 2), [ones((1, 8, 9), d)]),
    "focal_loss": lambda o, d: (lambda x: o.focal_loss(x, LABELS), [ones((3, 4), d)]),
    "focal_loss of probabilities": lambda o, d: (o.focal_loss, [ones((3, 4), d)] * 2),
    "focal_loss targets": lambda o, d: (
        lambda t: o.focal_loss(torch.ones(3, 4), t),
        [ones((3,), d)],
    ),
    "sigmoid_focal_loss": lambda o, d: (o.sigmoid_focal_loss, [ones((3, 4), d)] * 2),
    "sigmoid_focal_loss targets": lambda o, d: (
        lambda t: o.sigmoid_focal_loss(torch.ones(3, 4), t),
        [ones((3, 4), d)],
    ),
}

# torchvision's formula happens to run on complex targets; a probability is no complex number.
NOT_COPIED = {
    ("sigmoid_focal_loss targets", d) for d in (torch.complex64, torch.complex128, torch.complex32)
}


@parametrize("dtype", DTYPES, ids=str)
@parametrize("name", CALLS)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    def call(o: Any, *tensors: Tensor) -> Any:
        return CALLS[name](o, dtype)[0](*tensors)

    if (name, dtype) in NOT_COPIED:
        with pytest.raises(NotImplementedError):
            call(OURS, *CALLS[name](OURS, dtype)[1])
        return
    check_alike(call, CALLS[name](OURS, dtype)[1])


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "conv2d": (lambda o, x, w: o.conv2d(x, w), (1, 2, 4, 4), (2, 2, 3, 3)),
    "bias": (
        lambda o, x, b: o.conv2d(x, torch.ones(2, 2, 3, 3).to(x), b),
        (1, 2, 4, 4),
        (2,),
    ),
    "focal_loss weight": (lambda o, x, w: o.focal_loss(x, LABELS, w), (3, 4), (4,)),
    "focal_loss probabilities": (lambda o, x, t: o.focal_loss(x, t), (3, 4), (3, 4)),
    "focal_loss probabilities, weight": (
        lambda o, x, w: o.focal_loss(x, torch.ones(3, 4), w),
        (3, 4),
        (4,),
    ),
    "sigmoid_focal_loss": (lambda o, x, t: o.sigmoid_focal_loss(x, t), (3, 4), (3, 4)),
}


@parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@parametrize("name", MIXED)
def test_mixed_dtypes(name: str, autocast: torch.dtype | None) -> None:
    """Promoted, refused, or cast by autocast, as native does."""
    call, first, second = MIXED[name]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        for a, b in product(FLOATING, FLOATING):
            check_alike(call, [ones(first, a), ones(second, b)])


@parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@parametrize("name", CALLS)
def test_autocast(name: str, autocast: torch.dtype) -> None:
    def call(o: Any, *tensors: Tensor) -> Any:
        return CALLS[name](o, torch.float32)[0](*tensors)

    with torch.autocast("cpu", dtype=autocast):
        for dtype in (*FLOATING, torch.int64, torch.complex64):
            if (name, dtype) not in NOT_COPIED:
                check_alike(call, CALLS[name](OURS, dtype)[1])


# ----------------------------------------------------------------------------------- empty sizes


def sizes(*dims: int) -> list[tuple[int, ...]]:
    """Every way to leave dimensions empty."""
    return list(product(*((0, n) for n in dims)))


@parametrize("input", [*sizes(2, 2, 4, 4), *sizes(2, 4, 4)], ids=str)
def test_empty_images(input: tuple[int, ...]) -> None:
    x = torch.ones(input)
    for weight, padding in product(sizes(2, 2, 3, 3), (0, 1)):
        if 0 in input[:-3] and 0 not in input[-3:-2] and 0 in (*input[-2:], *weight[2:]):
            continue  # native looks into an empty weight or input here: an IndexError by accident
        for bias in ([], [torch.ones(weight[0])]):
            check_alike(
                lambda o, *t, p=padding: o.conv2d(*t, padding=p), [x, torch.ones(weight), *bias]
            )
    for kernel, padding in ((2, 0), (3, 1), (0, 0), ((2, 0), 0), (1, 0)):
        check_alike(lambda o, x, k=kernel, p=padding: o.max_pool2d(x, k, padding=p), [x])
        check_alike(
            lambda o, x, k=kernel, p=padding: o.max_pool2d(x, k, padding=p, return_indices=True),
            [x],
        )
        check_alike(lambda o, x, k=kernel, p=padding: o.unfold(x, k, padding=p), [x])


@parametrize("input", [*sizes(2, 8, 9), *sizes(8, 9)], ids=str)
def test_empty_columns(input: tuple[int, ...]) -> None:
    for output_size in ((4, 4), (0, 4), 4, (3, 0)):
        check_alike(lambda o, x, size=output_size: o.fold(x, size, 2), [torch.ones(input)])


LOGITS = [(), (0,), (3,), (0, 3), (2, 0), (0, 0), (2, 3, 0), (0, 3, 2), (2, 3, 4, 5)]


@parametrize("reduction", ["none", "mean", "sum"])
@parametrize("input", LOGITS, ids=str)
def test_empty_logits(input: tuple[int, ...], reduction: str) -> None:
    x = torch.ones(input)
    labels = torch.zeros((*input[:1], *input[2:]) if len(input) > 1 else (), dtype=torch.long)
    classes = input[1] if len(input) > 1 else sum(input)
    for target, smoothing, weight in product(
        (labels, torch.ones(input)), (0.0, 0.1), (None, torch.ones(classes))
    ):
        check_alike(
            lambda o, x, t=target, s=smoothing, w=weight: o.focal_loss(
                x, t, w, reduction=reduction, label_smoothing=s
            ),
            [x],
            values=classes > 0,  # of no classes: 0 here, with native 0 or NaN by the path it takes
        )
    check_alike(lambda o, x, t: o.sigmoid_focal_loss(x, t, reduction=reduction), [x, x])
    for other in ((), (1,), (3,), (2, 1)):
        check_alike(
            lambda o, x, t: o.sigmoid_focal_loss(x, t, reduction=reduction), [x, torch.ones(other)]
        )
