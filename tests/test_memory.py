"""Memory: the peak beside native's, no growth, nothing kept after an error, what backward keeps.

As a script it prints the peaks of its cases, which the tests then compare: they need a process that
has run nothing before.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import native
import pytest
import torch
from checks import normal
from peak import ALLOWED_PER_THREAD, SETTINGS, peak_of_forward_backward, status
from process import run
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import dlops.functional as F
from dlops import nn

pytestmark = pytest.mark.memory
parametrize = pytest.mark.parametrize

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LIBRARIES = {"native": native, "dlops": F}
Build = Callable[[Any], tuple[Callable[..., Tensor], list[Any]]]


# ---------------------------------------------------------------------------------------------
# Peaks. A case takes a library and gives a function of it with the arguments.


def image(size: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(size).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def conv2d(input: Any, weight: Any, layout: str, dtype: torch.dtype, **geometry: Any) -> Build:
    def build(library: Any) -> Any:
        w, bias = image(weight, layout, dtype), torch.zeros(weight[0], dtype=dtype)
        return partial(library.conv2d, **geometry), [image(input, layout, dtype), w, bias]

    return build


def max_pool2d(window: dict[str, int], layout: str, dtype: torch.dtype) -> Build:
    return lambda library: (
        partial(library.max_pool2d, **window),
        [image((16, 32, 56, 56), layout, dtype)],
    )


def unfold(library: Any) -> Any:
    return library.unfold, [image((4, 16, 56, 56), "contiguous", torch.float32), 3]


def fold(library: Any) -> Any:
    columns = torch.randn(4, 144, 54 * 54).requires_grad_()
    return library.fold, [columns, (56, 56), 3]


def sigmoid_focal_loss(library: Any) -> Any:
    logits = torch.randn(8192, 80).requires_grad_()
    return library.sigmoid_focal_loss, [logits, (torch.rand(8192, 80) < 0.05).float()]


def focal_loss(rows: int, classes: int) -> Build:
    def build(library: Any) -> Any:
        logits = torch.randn(rows, classes).requires_grad_()
        return library.focal_loss, [logits, torch.randint(classes, (rows,))]

    return build


def cases() -> dict[str, Build]:
    found: dict[str, Build] = {
        "unfold": unfold,
        "fold": fold,
        "sigmoid_focal_loss": sigmoid_focal_loss,
        "focal_loss 8192x100": focal_loss(8192, 100),
        "focal_loss 1x128000": focal_loss(1, 128_000),
        "focal_loss 64x100000": focal_loss(64, 100_000),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            where = f"{layout} {str(dtype).removeprefix('torch.')}"
            conv = partial(conv2d, layout=layout, dtype=dtype)
            found |= {
                f"conv2d 3x3 {where}": conv((16, 32, 28, 28), (64, 32, 3, 3), padding=1),
                f"conv2d 1x1 {where}": conv((4, 64, 28, 28), (128, 64, 1, 1)),
                f"conv2d 1x1 to 2048 {where}": conv((2, 64, 40, 40), (2048, 64, 1, 1)),
                f"conv2d first {where}": conv((8, 3, 64, 64), (32, 3, 5, 5), padding=2),
                f"conv2d strided {where}": conv((8, 8, 224, 224), (16, 8, 2, 2), stride=32),
                f"conv2d heavy {where}": conv((2, 512, 5, 5), (512, 512, 3, 3), padding=1),
                f"conv2d grouped {where}": conv(
                    (8, 64, 28, 28), (64, 16, 3, 3), padding=1, groups=4
                ),
                f"max_pool2d 2x2 {where}": max_pool2d({"kernel_size": 2}, layout, dtype),
                f"max_pool2d 3x3 {where}": max_pool2d(
                    {"kernel_size": 3, "stride": 2, "padding": 1}, layout, dtype
                ),
            }
    return found


def print_peaks() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    peaks = {
        name: {
            library: peak_of_forward_backward(partial(build, module))
            for library, module in LIBRARIES.items()
        }
        for name, build in cases().items()
    }
    print(json.dumps(peaks))


THREADS = 2


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    result = run(Path(__file__), cwd=tmp_path_factory.mktemp("peaks"), **SETTINGS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@parametrize("case", cases())
def test_peak_is_at_most_natives(peaks: Any, case: str) -> None:
    ours, theirs = peaks[case]["dlops"], peaks[case]["native"]
    assert ours > 0
    assert ours <= theirs + THREADS * ALLOWED_PER_THREAD, (
        f"{ours / 2**20:.1f} MiB, native {theirs / 2**20:.1f} MiB"
    )


def test_a_needless_copy_would_be_seen(tmp_path: Path) -> None:
    """The measurement itself: 16 MiB in an op show in full."""
    script = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        "import torch; from peak import peak_of_forward_backward\n"
        "x = torch.ones(1 << 20, requires_grad=True)\n"
        "plain = lambda x: x * 2\n"
        "wasteful = lambda x, _=None: (lambda waste: x * 2 + waste[0])(torch.ones(1 << 22))\n"
        "for f in (plain, wasteful): print(peak_of_forward_backward(lambda: (f, [x])))\n"
    )
    result = run("-c", script, cwd=tmp_path, OMP_NUM_THREADS="1", **SETTINGS)
    assert result.returncode == 0, result.stderr
    plain, wasteful = map(int, result.stdout.split())
    # Output, its gradient and the input's; two outputs and the waste.
    assert plain == pytest.approx(12 << 20, abs=1 << 20)
    assert wasteful == pytest.approx(24 << 20, abs=1 << 20)


# ---------------------------------------------------------------------------------------------
# Growth


def small(op: str) -> Callable[[], Tensor]:
    """A call of each op that needs a gradient."""
    x, weight = normal((2, 4, 6, 6), 1).requires_grad_(), normal((3, 4, 3, 3), 2).requires_grad_()
    columns = normal((2, 9, 16), 1).requires_grad_()
    logits, labels = normal((5, 7), 1).requires_grad_(), torch.arange(5)
    return {
        "conv2d": lambda: F.conv2d(x, weight),
        "max_pool2d": lambda: F.max_pool2d(x, 2),
        "unfold": lambda: F.unfold(x, 3),
        "fold": lambda: F.fold(columns, 6, 3),
        "focal_loss": lambda: F.focal_loss(logits, labels),
        "sigmoid_focal_loss": lambda: F.sigmoid_focal_loss(logits, logits.detach().sigmoid()),
    }[op]


OPS = ["conv2d", "max_pool2d", "unfold", "fold", "focal_loss", "sigmoid_focal_loss"]


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")[0]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def check_no_growth(call: Callable[[], None], calls: int, allowed: int, rounds: int = 3) -> None:
    """A leak shows in every round; pages that the allocator happens to keep, in one or two."""
    for _ in range(calls // 10):
        call()
    growth = []
    while len(growth) < rounds and (not growth or growth[-1] >= allowed):
        memory, tensors = resident(), live_tensors()
        for _ in range(calls):
            call()
        assert live_tensors() == tensors
        growth.append(resident() - memory)
    assert growth[-1] < allowed, f"each round of {calls} calls keeps {growth} bytes"


@parametrize("op", OPS)
def test_10000_calls_do_not_grow(op: str) -> None:
    """Less than the 64 bytes a call that the smallest tensor takes."""
    call = small(op)
    check_no_growth(lambda: call().sum().backward(), 10_000, allowed=10_000 * 64)


def test_images_of_many_sizes_do_not_grow() -> None:
    """Nothing is kept for a shape: neither kernels nor plans nor buffers."""
    layer = nn.Conv2d(16, 16, 3)
    sizes = itertools.count()

    def call() -> None:
        height, width = divmod(next(sizes), 60)
        layer(torch.zeros(1, 16, 4 + height, 4 + width)).sum().backward()

    check_no_growth(call, 1000, allowed=1000 * 64)


def test_growth_would_be_seen() -> None:
    """The check itself: 1 KiB kept by each call."""
    kept: list[bytearray] = []
    with pytest.raises(AssertionError, match="keeps"):
        check_no_growth(lambda: kept.append(bytearray(1024)), 5000, allowed=5000 * 64)


class Stop(Exception):
    pass


def stop(_: Any) -> None:
    raise Stop


@parametrize("op", OPS)
def test_an_exception_in_backward_frees_everything(op: str) -> None:
    call = small(op)

    def interrupted() -> None:
        output = call() * 1
        output.register_hook(stop)
        with pytest.raises(Stop):
            output.sum().backward()
        del output

    check_no_growth(interrupted, 1000, allowed=1000 * 64)


BAD_CALLS: dict[str, Callable[[Tensor], Any]] = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(2, 5, 3, 3)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2, padding=2),
    "unfold": lambda x: F.unfold(x, 700),
    "fold": lambda x: F.fold(x.flatten(2), 9, 2),
    "focal_loss": lambda x: F.focal_loss(x, torch.full((1, 512, 512), 9)),
    "sigmoid_focal_loss": lambda x: F.sigmoid_focal_loss(x, x[:, :1, 1:]),
}


@parametrize("op", OPS)
def test_a_refused_call_frees_everything(op: str) -> None:
    """4 MiB of input, 50 times: one copy that stayed would show."""

    def refused() -> None:
        x = torch.ones(1, 4, 512, 512).mT  # not contiguous, so that a copy may be under way
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            BAD_CALLS[op](x.requires_grad_())

    check_no_growth(refused, 50, allowed=2 << 20)


def test_a_thread_keeps_little_between_calls() -> None:
    """The 13 MB of tiles that a thread fills for so many classes go back."""
    logits = torch.zeros(32, 100_000, requires_grad=True)
    memory = resident()
    F.focal_loss(logits, torch.arange(32))
    assert resident() - memory < THREADS * (4 << 20)


# ---------------------------------------------------------------------------------------------
# What is kept for the backward pass, in bytes beyond the call's own arguments

f32 = partial(torch.randn, requires_grad=True)
bf16 = partial(f32, dtype=torch.bfloat16)
SAVED: dict[str, tuple[Callable[..., Any], list[Any], set[int], int]] = {
    # op: function, arguments, which of them are kept as they are, bytes of what else is
    "conv2d": (F.conv2d, [f32(2, 4, 9, 9), f32(3, 4, 3, 3), f32(3)], {0, 1}, 0),
    "conv2d, fixed weight": (F.conv2d, [f32(2, 4, 9, 9), torch.randn(3, 4, 3, 3)], {1}, 0),
    "conv2d, fixed input": (F.conv2d, [torch.randn(2, 4, 9, 9), f32(3, 4, 3, 3)], {0}, 0),
    "max_pool2d": (F.max_pool2d, [f32(2, 4, 8, 8), 2], set(), 2 * 4 * 4 * 4),
    "max_pool2d, over 256 cells": (F.max_pool2d, [f32(1, 1, 18, 18), 17, 1], set(), 8 * 4),
    "unfold": (F.unfold, [f32(2, 4, 8, 8), 3], set(), 0),
    "fold": (F.fold, [f32(2, 9, 36), 8, 3], set(), 0),
    "focal_loss": (F.focal_loss, [f32(5, 7), torch.arange(5), torch.ones(7)], {0, 1, 2}, 144),
    "focal_loss, low": (F.focal_loss, [bf16(5, 7), torch.arange(5)], {0, 1}, 4),
    "sigmoid_focal_loss": (F.sigmoid_focal_loss, [f32(5, 7), torch.ones(5, 7)], {0, 1}, 140),
    "sigmoid_focal_loss, soft": (F.sigmoid_focal_loss, [f32(5, 7), f32(5, 7)], {0, 1}, 0),
}


@parametrize("case", SAVED)
def test_saved_for_backward(case: str) -> None:
    function, arguments, kept, others = SAVED[case]
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x
        return x

    with saved_tensors_hooks(save, lambda x: x):
        function(*arguments)
    places = [x.data_ptr() if isinstance(x, Tensor) else None for x in arguments]
    assert {i for i, place in enumerate(places) if place in saved} == kept
    assert sum(x.nbytes for place, x in saved.items() if place not in places) == others


if __name__ == "__main__":
    print_peaks()
