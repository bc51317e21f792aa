"""max_pool2d: the windows of the example networks and of ResNet."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import dlops.functional

from .harness import Case, Problem, Work
from .layouts import LAYOUTS

# batch, channels, image, kernel, stride, padding
SHAPES = [
    (32, 32, 28, 2, 2, 0),
    (64, 64, 32, 2, 2, 0),
    (32, 64, 56, 2, 2, 0),
    (128, 128, 13, 3, 2, 0),
    (32, 64, 112, 3, 2, 1),
    (8, 256, 56, 3, 1, 1),
]
FULL = [
    (batch, 64, image, *window)
    for batch in (1, 8, 32)
    for image in (28, 56, 112)
    for window in ((2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1))
]


def cases(scope: str) -> Iterator[Case]:
    for shape in {"quick": SHAPES[:1], "default": SHAPES, "full": SHAPES + FULL}[scope]:
        batch, channels, image, kernel, stride, padding = shape
        name = f"{batch}x{channels}x{image}x{image}, {kernel}x{kernel} s{stride} p{padding}"
        for layout in LAYOUTS:
            yield Case("max_pool2d", name, layout, partial(problem, shape, layout))


def problem(
    shape: tuple[int, ...], layout: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    batch, channels, image, kernel, stride, padding = shape
    values = torch.randn(batch, channels, image, image, device=device, dtype=dtype)
    values = values.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    window: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": padding}
    outputs = batch * channels * ((image + 2 * padding - kernel) // stride + 1) ** 2
    once = (values.numel() + outputs) * dtype.itemsize
    return Problem(
        contenders={
            "native": partial(F.max_pool2d, **window),
            "dlops": partial(dlops.functional.max_pool2d, **window),
        },
        inputs=(values,),
        work={"forward": Work(0, once), "forward+backward": Work(0, 2 * once)},
    )
