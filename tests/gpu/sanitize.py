"""Runs every kernel once or twice on small inputs: what compute-sanitizer looks at.

PYTHONPATH=tests compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import torch
from cases import LAYOUTS, FocalCase
from checks import cast, values_and_gradients
from problems import PROBLEMS, focal_loss
from test_focal_loss import VARIANTS

WANTED = ("3x3", "grouped", "tails", "1x1", "dilated", "ceil", "cells_over_256", "7x7_stride")
ROWS = [FocalCase("", size) for size in ((7, 5), (7, 100), (3, 2500), (2, 5, 3, 4))]


def main() -> None:
    images = [p for p in PROBLEMS if p.id.split()[1] in WANTED]
    losses = [p for p in PROBLEMS if "focal" in p.id and p.id.split()[1] == "10_classes"]
    losses += [focal_loss(case, v, gamma=2.0, reduction="mean") for case in ROWS for v in VARIANTS]
    for dtype in (torch.float32, torch.bfloat16):
        for problem in images + losses:
            first, *others = [None if x is None else x.cuda() for x in cast(problem.inputs, dtype)]
            assert first is not None
            layouts = ["contiguous", "channels_last"] if first.dim() == 4 else ["contiguous"]
            for layout in layouts:
                values_and_gradients(problem.ours, [LAYOUTS[layout](first), *others])
    torch.cuda.synchronize()
    print("sanitize: done")


if __name__ == "__main__":
    main()
