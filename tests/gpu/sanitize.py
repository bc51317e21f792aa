"""Runs kernels on small inputs, once each: what compute-sanitizer looks at, which takes its time.

PYTHONPATH=tests:tests/gpu compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [PART...]
"""

from __future__ import annotations

import sys

import torch
from cases import LAYOUTS
from checks import cast, values_and_gradients
from parts import PARTS, numbers, prepare, problems
from problems import Problem
from test_implicit_gemm import DEVICE, on_device


def run(problem: Problem, dtype: torch.dtype, layout: str) -> None:
    first, *others = on_device(cast(problem.inputs, dtype))
    if first.dim() == 4:
        first = LAYOUTS[layout](first)
    values_and_gradients(problem.ours, [first, *others])


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        prepare(part)
        for problem in problems(part):
            for precision, dtype in numbers(part):
                # Of float32 wgmma multiplies what boxes bring alone.
                if part == "implicit_gemm_wgmma" and dtype == torch.float32:
                    continue
                torch.set_float32_matmul_precision(precision)
                last = dtype == torch.float32 and "pointwise" not in problem.id
                run(problem, dtype, "channels_last" if last else "contiguous")
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"sanitize: {part} done", flush=True)


if __name__ == "__main__":
    main()
