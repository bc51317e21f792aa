"""``python -m benchmarks.ways``: the ways of convolution on a GPU, side by side.

One process for all, as suits a short loan of a GPU: a layer's truth is worked out once, and native
is timed once. Writes the rows that ``python -m benchmarks --show`` prints, an op for each way.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import bench_conv2d, report
from .harness import Case, check, grad_output_for, result, time_passes
from .machine import ROOT, context, describe
from .roofline import Limits
from .run import write
from .timing import Budget

VARIABLE = "DLOPS_CUDA_CONV2D"  # read at each call
WAYS = ("im2col", "implicit_gemm", "implicit_gemm_wgmma", "implicit_gemm_tma")


def go(way: str, convolution: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The convolution, and its backward pass until another way is gone."""
    os.environ[VARIABLE] = way
    return convolution(*inputs)


def measure(
    case: Case,
    ways: list[str],
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    budget: Budget,
) -> tuple[list[report.Row], list[str]]:
    """Rows of the ways that agree with native, and what there is to say against the others."""
    torch.manual_seed(0)
    problem = case.build(device, dtype)
    ours = problem.contenders["dlops"]
    contenders = {"native": problem.contenders["native"]}
    contenders |= {way: partial(go, way, ours) for way in ways}
    problem = replace(problem, contenders=contenders)
    grad_output = grad_output_for(problem)
    errors, wrong = check(problem, grad_output)
    right = {name: contender for name, contender in contenders.items() if name not in wrong}
    rows = []
    times = time_passes(replace(problem, contenders=right), grad_output, device, budget)
    for way in filter(right.__contains__, ways):
        for name, of_all in times.items():
            named = replace(case, op=f"{case.op} {way}")
            sides = {"native": of_all["native"], "dlops": of_all[way]}
            both = {"native": errors["native"], "dlops": errors[way]}
            work, copy = problem.work[name], of_all["copy"]
            rows.append(result(named, dtype, name, work, limits, copy, times=sides, errors=both))
    return rows, list(wrong.values())


def lines(rows: list[report.Row]) -> Iterator[str]:
    """A case's times in ms: native's, then each way's."""
    for name, short in report.PASSES.items():
        chosen = [row for row in rows if row["pass"] == name]
        times = {"native": chosen[0]["times"]["native"]} if chosen else {}
        times |= {row["op"].split()[-1]: row["times"]["dlops"] for row in chosen}
        cells = (f"{way} {time['median_s'] * 1e3:.3f}" for way, time in times.items())
        yield f"  {short}: {', '.join(cells)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.ways", description=__doc__)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--device", choices=["cpu", "cuda"], default="cuda")
    add("--dtype", nargs="+", default=["bfloat16", "float32"], help="float32: as TF32")
    add("--quick", action="store_true", help="one small case, to see that all works")
    add("--seconds", type=float, default=0.1, help="for each pass of each case (default: 0.1)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-ways")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    about = context(device)
    print(describe(about))
    limits, budget = Limits(device), Budget(options.seconds, 5)
    scope = "quick" if options.quick else "default"
    rows: list[report.Row] = []
    complaints: list[str] = []
    try:
        for dtype in options.dtype:
            for case in bench_conv2d.cases(scope, on_gpu=True):
                print(f"{case.name} {case.layout} {dtype}", flush=True)
                found, wrong = measure(
                    case, options.ways, device, getattr(torch, dtype), limits, budget
                )
                rows += found
                complaints += [f"{case.name} {case.layout} {dtype}: {text}" for text in wrong]
                print(*lines(found), sep="\n", flush=True)
    finally:  # what there is by then, where the time is up
        if rows:
            print(report.means(rows))
            write(options.out, {"context": about, "limits": limits.measured, "rows": rows})
        print(*(f"DISAGREES, not timed: {text}" for text in complaints), sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
