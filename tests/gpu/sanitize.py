"""Runs every kernel once or twice on small inputs: what compute-sanitizer looks at.

PYTHONPATH=tests:tests/gpu compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import os

import torch
from cases import LAYOUTS, FocalCase
from checks import cast, values_and_gradients
from problems import PROBLEMS, Problem, conv2d, focal_loss
from test_focal_loss import VARIANTS
from test_implicit_gemm import BOXES, DEPTHWISE, TILES

WANTED = ("3x3", "grouped", "tails", "1x1", "dilated", "ceil", "cells_over_256", "7x7_stride")
ROWS = [
    FocalCase("", size)
    for size in ((7, 5), (7, 100), (3, 1000), (3, 2500), (2, 5, 3, 4), (2, 300, 3, 4))
]


def run(problems: list[Problem], dtype: torch.dtype) -> None:
    for problem in problems:
        first, *others = [None if x is None else x.cuda() for x in cast(problem.inputs, dtype)]
        assert first is not None
        layouts = ["contiguous", "channels_last"] if first.dim() == 4 else ["contiguous"]
        for layout in layouts:
            values_and_gradients(problem.ours, [LAYOUTS[layout](first), *others])


def main() -> None:
    images = [p for p in PROBLEMS if p.id.split()[1] in WANTED]
    losses = [p for p in PROBLEMS if "focal" in p.id and p.id.split()[1] == "10_classes"]
    tiles = [conv2d(case) for case in [*TILES, *DEPTHWISE] if case.id != "large_tiles"]
    losses += [focal_loss(case, v, gamma=2.0, reduction="mean") for case in ROWS for v in VARIANTS]
    for dtype in (torch.float32, torch.bfloat16):
        run(images + losses, dtype)
    torch.set_float32_matmul_precision("high")
    convolutions = [problem for problem in images if "conv2d" in problem.id] + tiles
    os.environ["DLOPS_CUDA_CONV2D"] = "implicit_gemm"
    for dtype in (torch.float32, torch.bfloat16):
        run(convolutions, dtype)
    if torch.cuda.get_device_capability() == (9, 0):
        os.environ["DLOPS_CUDA_CONV2D"] = "implicit_gemm_wgmma"
        run(convolutions, torch.bfloat16)
        os.environ["DLOPS_CUDA_CONV2D"] = "implicit_gemm_tma"
        for dtype in (torch.float32, torch.bfloat16):
            run([conv2d(case) for case in BOXES if case.id in ("boxes", "far_boxes")], dtype)
    torch.cuda.synchronize()
    print("sanitize: done")


if __name__ == "__main__":
    main()
