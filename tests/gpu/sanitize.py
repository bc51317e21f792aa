"""Runs kernels on small inputs, once or twice each: what compute-sanitizer looks at.

PYTHONPATH=tests:tests/gpu compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [PART...]
"""

from __future__ import annotations

import sys

import torch
from cases import LAYOUTS
from checks import cast, values_and_gradients
from parts import PARTS, prepare, problems
from problems import Problem
from test_implicit_gemm import DEVICE, on_device


def run(problem: Problem, dtype: torch.dtype) -> None:
    first, *others = on_device(cast(problem.inputs, dtype))
    assert first is not None
    for layout in ["contiguous", "channels_last"] if first.dim() == 4 else ["contiguous"]:
        values_and_gradients(problem.ours, [LAYOUTS[layout](first), *others])


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        prepare(part)
        for problem in problems(part):
            for dtype in (torch.bfloat16, torch.float32):
                # Of float32 wgmma multiplies what boxes brought alone.
                if part != "implicit_gemm_wgmma" or dtype == torch.bfloat16:
                    run(problem, dtype)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"sanitize: {part} done", flush=True)


if __name__ == "__main__":
    main()
