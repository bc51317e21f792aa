"""unfold and fold: im2col and col2im with the column buffer as the result."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

import dlops.functional

from .harness import Case, Problem, Work

# batch, channels, image, kernel, padding
SHAPES = [(8, 32, 28, 3, 1), (8, 64, 56, 3, 1), (8, 3, 112, 7, 3)]


def cases(scope: str) -> Iterator[Case]:
    for op in ("unfold", "fold"):
        for shape in SHAPES[:1] if scope == "quick" else SHAPES:
            batch, channels, image, kernel, padding = shape
            name = f"{batch}x{channels}x{image}x{image}, {kernel}x{kernel} p{padding}"
            yield Case(op, name, "NCHW", partial(problem, op, shape))


def problem(op: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Problem:
    batch, channels, image, kernel, padding = shape
    window = {"kernel_size": kernel, "padding": padding}
    values = torch.randn(batch, channels, image, image, device=device, dtype=dtype)
    columns = F.unfold(values, **window)
    once = (values.numel() + columns.numel()) * dtype.itemsize
    arguments = window if op == "unfold" else window | {"output_size": (image, image)}
    return Problem(
        contenders={
            "native": partial(getattr(F, op), **arguments),
            "dlops": partial(getattr(dlops.functional, op), **arguments),
        },
        inputs=((values if op == "unfold" else columns).requires_grad_(),),
        work={"forward": Work(0, once), "forward+backward": Work(0, 2 * once)},
    )
