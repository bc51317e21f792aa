"""A few problems of each op, and of each way of convolution: what runs first on a GPU (smoke.py),
and what compute-sanitizer looks at (sanitize.py), part by part."""

from __future__ import annotations

import os

import torch
from cases import CONV2D, Conv2dCase, FocalCase
from checks import Fill, normal
from problems import PROBLEMS, Problem, conv2d, focal_loss
from test_focal_loss import VARIANTS
from test_implicit_gemm import BOXES, DEPTHWISE, TILES

OPS = {
    "unfold": ("unfold", "fold"),
    "max_pool2d": ("max_pool2d",),
    "sigmoid_focal_loss": ("sigmoid_focal_loss",),
    "focal_loss": ("focal_loss",),
}
WAYS = ("im2col", "implicit_gemm", "implicit_gemm_wgmma", "implicit_gemm_tma")
PARTS = (*OPS, *WAYS)

USUAL = ("3x3", "1x1", "grouped", "tails", "dilated", "7x7_stride", "ceil", "cells_over_256")
LOSSES = ("10_classes", "80_classes")
ROWS = [
    FocalCase("", size)
    for size in ((7, 5), (7, 100), (3, 1000), (3, 2500), (2, 5, 3, 4), (2, 300, 3, 4))
]
CASES: dict[str, list[Conv2dCase]] = {
    "im2col": [case for case in CONV2D if case.id in USUAL],
    "implicit_gemm": [*TILES, *DEPTHWISE],
    # Where tiles are large, or have enough outputs for the gradient of the weight.
    "implicit_gemm_wgmma": [
        case for case in TILES if "large" in case.id or case.weight[0] // case.groups > 64
    ],
    "implicit_gemm_tma": BOXES,
}


def prepare(part: str) -> None:
    """Sets what the part goes by, for the whole process."""
    if part in WAYS:
        os.environ["DLOPS_CUDA_CONV2D"] = part
    torch.backends.cudnn.allow_tf32 = part in WAYS[1:]


def numbers(part: str) -> list[tuple[str, torch.dtype]]:
    """The precision of float32's products (torch.set_float32_matmul_precision), and dtypes."""
    precision = "high" if part in WAYS[1:] else "highest"
    chosen = [(precision, torch.bfloat16), (precision, torch.float32)]
    if part == "implicit_gemm":
        chosen += [("highest", torch.float32), ("highest", torch.float64)]
    return chosen


def problems(part: str, fill: Fill = normal) -> list[Problem]:
    """`fill`: of convolutions."""
    if part in WAYS:
        return [conv2d(case, fill) for case in CASES[part]]
    of_op = [problem for problem in PROBLEMS if problem.id.split()[0] in OPS[part]]
    chosen = [problem for problem in of_op if problem.id.split()[1] in (*USUAL, *LOSSES)]
    if part == "focal_loss":
        chosen += [focal_loss(c, v, gamma=2.0, reduction="mean") for c in ROWS for v in VARIANTS]
    return chosen
