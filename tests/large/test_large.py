"""Tensors of more than 2^31 elements: offsets that 32 bits cannot hold, checked on slices.

    make test-large

One case at a time, within 24 GiB. Each takes minutes; one that lacks memory is skipped, and says
how much it needs.
"""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import native
import pytest
import torch
from tolerances import TOLERANCES, error
from torch import Tensor

import dlops.functional as F

pytestmark = pytest.mark.large

GIB = 2**30
OVER = 2**31


@contextmanager
def within(gib: float) -> Iterator[None]:
    """Skips where the memory is not there; fails where more than that is used."""
    gc.collect()
    available = available_memory()
    if available < (gib + 0.5) * GIB:
        pytest.skip(f"needs {gib + 0.5:.1f} GiB of free memory; {available / GIB:.1f} GiB are free")
    peak = Peak()
    with peak:
        yield
    print(f"peak {peak.used / GIB:.1f} GiB")
    assert peak.used <= gib * GIB, f"used {peak.used / GIB:.1f} GiB, {gib} GiB were allowed"


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Peak:
    """The most that the process has resident, above what it had before."""

    def __enter__(self) -> None:
        self.before = resident()
        self.used = 0
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()

    def watch(self) -> None:
        while not self.stop.wait(0.02):
            self.used = max(self.used, resident() - self.before)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.watcher.join()


def numbered(size: tuple[int, ...], dtype: torch.dtype, top: int = 61) -> Tensor:
    """Small numbers in a pattern whose period is no power of two, so that no offset that is wrong
    by 2^31 or 2^32 goes unseen."""
    pattern = (torch.arange(1021) * 37 % top).to(dtype)
    result = torch.empty(size, dtype=dtype)
    flat, block = result.view(-1), pattern.repeat(4096)
    for begin in range(0, flat.numel(), block.numel()):
        end = min(begin + block.numel(), flat.numel())
        flat[begin:end] = block[: end - begin]
    return result


def check(ours: Tensor, theirs: Tensor) -> None:
    if ours.dtype in TOLERANCES:
        assert error(ours, theirs) <= TOLERANCES[ours.dtype].bound
    else:
        assert torch.equal(ours, theirs)


def places(count: int) -> list[int]:
    """The first, the last and those on both sides of 2^31 / size of an index of the dimension."""
    return sorted({0, 1, count // 2 - 1, count // 2, count - 2, count - 1} & set(range(count)))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_max_pool2d(last: bool) -> None:
    """One image over the limit, in bytes; the output's windows are checked plane by plane."""
    with within(6):
        image = numbered((1, 3, 26_500, 27_500), torch.uint8, top=251)
        if last:  # the same memory, seen as channels_last
            image = image.view(1, 26_500, 27_500, 3).permute(0, 3, 1, 2)
        assert image.numel() > OVER
        output = F.max_pool2d(image, 3, 2, 1)
        for c in range(3):
            for row in places(output.shape[2])[1:-1]:
                strip = image[:, c : c + 1, 2 * row - 1 : 2 * row + 2].contiguous()
                expected = native.max_pool2d(strip, 3, 2, (0, 1))
                check(output[:, c : c + 1, row : row + 1], expected)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_max_pool2d_backward(last: bool) -> None:
    with within(14):
        image = numbered((5, 64, 2600, 2600), torch.bfloat16)
        if last:
            image = image.view(5, 2600, 2600, 64).permute(0, 3, 1, 2)
        assert image.numel() > OVER
        image.requires_grad_()
        output = F.max_pool2d(image, 2)
        grad_output = numbered(tuple(output.shape), torch.bfloat16)
        (gradient,) = torch.autograd.grad(output, image, grad_output)
        for n in (0, 4):
            for c in (0, 63):
                plane = image.detach()[n : n + 1, c : c + 1].contiguous().requires_grad_()
                pooled = native.max_pool2d(plane, 2)
                check(output[n : n + 1, c : c + 1].detach(), pooled.detach())
                grad = grad_output[n : n + 1, c : c + 1]
                (expected,) = torch.autograd.grad(pooled, plane, grad)
                check(gradient[n : n + 1, c : c + 1], expected)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_conv2d(last: bool) -> None:
    """Input, and then gradient of the input, over the limit; against native on single images."""
    with within(7):
        image = numbered((9, 4, 7800, 7800), torch.int8, top=3)
        if last:
            image = image.view(9, 7800, 7800, 4).permute(0, 3, 1, 2)
        assert image.numel() > OVER
        weight = numbered((2, 4, 3, 3), torch.int8, top=2)
        geometry = ([4, 4], [1] * 4, [1, 1], 1)
        output = torch.ops.dlops.conv2d(image, weight, None, *geometry)
        for n in (0, 4, 8):
            check(output[n : n + 1], native.conv2d(image[n : n + 1], weight, None, 4, 1))
        size = image.shape
        del image
        grad_output = output.remainder(3)
        grad_input = torch.ops.dlops.conv2d_grad_input(grad_output, weight, size, *geometry)
        for n in (0, 8):
            grad = grad_output[n : n + 1].float()
            expected = torch.nn.grad.conv2d_input((1, *size[1:]), weight.float(), grad, 4, 1)
            check(grad_input[n : n + 1], expected.to(torch.int8))


def test_conv2d_grad_weight() -> None:
    """The sum over 2^31 inputs is that over its images."""
    with within(11):
        image = numbered((9, 4, 7800, 7800), torch.bfloat16, top=5)
        grad_output = numbered((9, 2, 1950, 1950), torch.bfloat16, top=7)
        geometry = ([3, 3], [4, 4], [1] * 4, [1, 1], 1)
        together = torch.ops.dlops.conv2d_grad_weight(grad_output, image, *geometry)
        total = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
        for n in range(9):
            total += torch.nn.grad.conv2d_weight(
                image[n : n + 1].float(), (2, 4, 3, 3), grad_output[n : n + 1].float(), 4, 1
            )
        check(together, total)


def test_unfold() -> None:
    """Columns over the limit."""
    with within(8):
        image = numbered((2, 5, 5200, 5200), torch.bool, top=2)
        columns = F.unfold(image, 3)
        assert columns.numel() > OVER
        for n in (0, 1):
            for c in (0, 4):
                expected = native.unfold(image[n : n + 1, c : c + 1], 3)
                check(columns[n : n + 1, 9 * c : 9 * c + 9], expected)


def test_fold() -> None:
    with within(12):
        columns = numbered((2, 45, 4890 * 4890), torch.float16, top=7)
        assert columns.numel() > OVER
        image = F.fold(columns, 4892, 3)
        for n in (0, 1):
            for c in (0, 4):
                part = columns[n : n + 1, 9 * c : 9 * c + 9].float()
                check(image[n : n + 1, c : c + 1], native.fold(part, 4892, 3))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sigmoid_focal_loss(reduction: str) -> None:
    with within(14):
        inputs = numbered((OVER // 1000 + 1000, 1000), torch.bfloat16, top=13)
        inputs -= 6
        targets = numbered(tuple(inputs.shape), torch.bfloat16, top=2)
        if reduction == "none":
            loss = F.sigmoid_focal_loss(inputs, targets)
            for rows in (slice(0, 1000), slice(-1000, None), slice(2_146_000, 2_149_000)):
                check(loss[rows], native.sigmoid_focal_loss(inputs[rows], targets[rows]))
            return
        inputs.requires_grad_()
        loss = F.sigmoid_focal_loss(inputs, targets, reduction="mean")
        (gradient,) = torch.autograd.grad(loss, inputs, torch.tensor(2.0**31).bfloat16())
        for rows in (slice(0, 1000), slice(-1000, None)):
            part = inputs.detach()[rows].float().requires_grad_()
            total = native.sigmoid_focal_loss(part, targets[rows].float(), reduction="sum")
            (expected,) = torch.autograd.grad(total * 2.0**31 / inputs.numel(), part)
            check(gradient[rows], expected)


def test_focal_loss() -> None:
    with within(13):
        logits = numbered((OVER // 1000 + 1000, 1000), torch.bfloat16, top=13)
        labels = torch.arange(logits.shape[0]) * 7 % 1000
        logits.requires_grad_()
        loss = F.focal_loss(logits, labels, gamma=0.0, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        for rows in (slice(0, 500), slice(-500, None), slice(2_147_000, 2_147_900)):
            part = logits.detach()[rows].float().requires_grad_()
            total = native.cross_entropy(part, labels[rows], reduction="sum")
            (expected,) = torch.autograd.grad(total, part)
            check(gradient[rows], expected)
