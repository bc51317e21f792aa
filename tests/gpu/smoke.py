"""One op, or one way of convolution, forward and backward against native: what runs first on a GPU.

PYTHONPATH=tests:tests/gpu python tests/gpu/smoke.py implicit_gemm_tma

A process for each part, since a kernel that fails takes its process along. Each problem is named
before it starts, so that one which never ends is known.
"""

from __future__ import annotations

import sys

import torch
from cases import LAYOUTS
from checks import cast, check_against_native, normal, small_integers
from parts import PARTS, WAYS, numbers, prepare, problems
from problems import Problem
from test_implicit_gemm import DEVICE, check_rounded_once, on_device

# Enough to see whether a way works; the tests have the others. The smallest first.
LARGE = ("large_tiles", "large_narrow_tiles", "large_groups", "tiles_too_few_to_be_wide")
CHOSEN = {
    "implicit_gemm": (
        *("whole_tiles", "first_layer", "wide_stride", "depthwise_vectors", "pointwise"),
        *LARGE[:2],
    ),
    "implicit_gemm_wgmma": ("whole_tiles", *LARGE, "large_first_layer"),
    "implicit_gemm_tma": ("boxes_too_few_to_be_wide", "boxes", "filled_up_boxes", "wide_boxes"),
}


def check(part: str, problem: Problem, dtype: torch.dtype) -> None:
    first, *others = problem.inputs
    assert first is not None
    layout = "channels_last" if first.dim() == 4 and "pointwise" not in problem.id else "contiguous"
    inputs = [LAYOUTS[layout](first), *others]
    if part in WAYS[1:]:  # exact in TF32 too, whatever native's products are
        check_rounded_once(problem, inputs, dtype)
    else:
        check_against_native(problem.ours, problem.native, on_device(cast(inputs, dtype)), dtype)


def main() -> int:
    (part,) = sys.argv[1:]
    if part not in PARTS:
        sys.exit(f"smoke: one of {', '.join(PARTS)}")
    prepare(part)
    chosen = problems(part, small_integers if part in WAYS[1:] else normal)
    if part in CHOSEN:
        by_name = {problem.id.split()[1]: problem for problem in chosen}
        chosen = [by_name[name] for name in CHOSEN[part]]
    failed = 0
    for problem in chosen:
        for precision, dtype in numbers(part):
            torch.set_float32_matmul_precision(precision)
            name = str(dtype).removeprefix("torch.")
            print(problem.id, name, precision, end=" ... ", flush=True)
            try:
                check(part, problem, dtype)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
            except AssertionError as error:
                failed += 1
                print(f"WRONG: {error}", flush=True)
            else:
                print("right", flush=True)
    print(f"smoke: {part}", f"{failed} wrong" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
