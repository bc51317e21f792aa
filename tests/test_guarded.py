"""No kernel reads before or past its tensors: forward and backward on memory between pages that
nobody may touch (guarded.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from cases import CONV2D, LAYOUTS, MAX_POOL2D, Conv2dCase, MaxPool2dCase, ids
from checks import Function, small_integers
from guarded import guarded
from tolerances import DTYPES
from torch import Tensor

import dlops.functional as F

parametrize = pytest.mark.parametrize
pytestmark = [
    pytest.mark.special,
    pytest.mark.skipif(sys.platform != "linux", reason="pages are protected with Linux's calls"),
]
WIDTHS = [3, 8, 15, 16, 17, 31, 33, 48, 57, 71, 133]


@parametrize("at_end", [False, True], ids=["start", "end"])
def test_one_element_too_far_is_found(at_end: bool) -> None:
    script = f"""
import ctypes, torch
from guarded import guarded
with guarded(torch.ones(100), {at_end}) as x:
    print(x.sum().item(), flush=True)
    ctypes.c_float.from_address(x.data_ptr() + {400 if at_end else -4}).value
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.stdout.split() == ["100.0"], run.stderr
    assert run.returncode == -signal.SIGSEGV


def gradients_on_guarded(function: Function, tensors: list[Tensor], at_end: bool) -> list[Tensor]:
    """The output and the gradients of `tensors`, which are read from guarded copies, as is the
    gradient of the output."""
    with ExitStack() as stack:
        leaves = [stack.enter_context(guarded(t, at_end)).requires_grad_() for t in tensors]
        output = function(*leaves)
        grad_output = stack.enter_context(guarded(small_integers(output.shape).to(output), at_end))
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def check(function: Function, tensors: list[Tensor]) -> None:
    """The same as on memory of the usual kind."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    grad_output = small_integers(output.shape).to(output)
    expected = [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]
    for at_end in (False, True):
        for result, value in zip(
            gradients_on_guarded(function, tensors, at_end), expected, strict=True
        ):
            assert torch.equal(result, value)


@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("case", MAX_POOL2D, ids=ids)
def test_max_pool2d(case: MaxPool2dCase, layout: str, dtype: torch.dtype) -> None:
    image = LAYOUTS[layout](case.tensor(small_integers).to(dtype))
    check(lambda x: F.max_pool2d(x, **case.arguments()), [image])


@parametrize("dtype", DTYPES, ids=ids)
@parametrize(
    "kernel_size, stride, padding",
    [(2, 2, 0), (3, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1), (5, 1, 2)],
)
def test_max_pool2d_of_every_tail(
    kernel_size: int, stride: int, padding: int, dtype: torch.dtype
) -> None:
    for width in WIDTHS:
        for planes in (1, 3, 17):
            image = small_integers((1, planes, 9, width)).to(dtype)
            check(lambda x: F.max_pool2d(x, kernel_size, stride, padding), [image])
    for channels in (16, 40, 70):
        image = LAYOUTS["channels_last"](small_integers((1, channels, 9, 7)).to(dtype))
        check(lambda x: F.max_pool2d(x, kernel_size, stride, padding), [image])


@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("case", CONV2D, ids=ids)
def test_conv2d(case: Conv2dCase, layout: str, dtype: torch.dtype) -> None:
    image, *others = (t for t in case.tensors(small_integers) if t is not None)
    tensors = [LAYOUTS[layout](image).to(dtype), *(t.to(dtype) for t in others)]
    check(lambda *inputs: F.conv2d(*inputs, **case.arguments()), tensors)
