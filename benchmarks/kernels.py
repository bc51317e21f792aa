"""``python -m benchmarks.kernels``: which kernels a forward and a backward pass run on a GPU, and
how long each takes: native's, dlops', and those of each way of convolution.

By torch.profiler, so that the times of kernels, not of calls, are told apart. Prints them as they
are found and writes them as JSON.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import bench_conv2d, bench_focal_loss, bench_max_pool2d
from .harness import Case, Problem, forward_backward, grad_output_for
from .machine import ROOT, context, describe
from .timing import Step
from .ways import WAYS, go

CALLS = 4  # whose times are averaged
ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}


def kernels(step: Step, device: torch.device) -> list[dict[str, Any]]:
    """Name, launches and microseconds a call of each kernel, in the order of their first launch; on
    a CPU, of each op."""
    for _ in range(3):  # plans and warms up
        step()
    with profile(activities=[ACTIVITIES[device.type]]) as profiled:
        for _ in range(CALLS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
        if device.type == "cpu":
            found.setdefault(event.name, []).append(event.self_cpu_time_total)
        elif event.device_type == DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return [
        {"kernel": name, "launches": len(times) / CALLS, "us": sum(times) / CALLS}
        for name, times in found.items()
    ]


def contenders(problem: Problem, ways: list[str]) -> Iterator[tuple[str, Any]]:
    yield "native", problem.contenders["native"]
    for way in ways:
        yield way, partial(go, way, problem.contenders["dlops"])
    if not ways:
        yield "dlops", problem.contenders["dlops"]


def cases(scope: str) -> Iterator[Case]:
    """The largest matter most, and the time may be up before the last."""
    convolutions = list(bench_conv2d.cases(scope, on_gpu=True))
    yield from reversed([case for case in convolutions if case.layout == "channels_last"])
    yield from bench_focal_loss.cases(scope, compiled=False)
    yield from bench_max_pool2d.cases(scope)
    yield from reversed([case for case in convolutions if case.layout != "channels_last"])


def lines(row: dict[str, Any]) -> Iterator[str]:
    total = sum(kernel["us"] for kernel in row["kernels"])
    yield f"{row['op']} {row['case']} {row['layout']} {row['dtype']}, {row['side']}: {total:.1f} us"
    for kernel in row["kernels"]:
        yield f"  {kernel['us']:8.2f} us {kernel['launches']:5.2f} x {kernel['kernel'][:120]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--device", choices=list(ACTIVITIES), default="cuda")
    add("--dtype", nargs="+", default=["bfloat16"])
    add("--quick", action="store_true", help="one small case of each op, to see that all works")
    add("--seconds", type=float, default=60, help="no case is begun after so many (default: 60)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-kernels")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    about = context(device)
    print(describe(about))
    rows: list[dict[str, Any]] = []
    chosen = itertools.product(cases("quick" if options.quick else "default"), options.dtype)
    for case, dtype in itertools.takewhile(lambda _: time.monotonic() < end, chosen):
        torch.manual_seed(0)
        problem = case.build(device, getattr(torch, dtype))
        grad_output = grad_output_for(problem)
        ways = options.ways if case.op == "conv2d" else []
        for side, function in contenders(problem, ways):
            step = forward_backward(function, problem.inputs, grad_output)
            about_case = {"op": case.op, "case": case.name, "layout": case.layout, "dtype": dtype}
            rows.append({**about_case, "side": side, "kernels": kernels(step, device)})
            print(*lines(rows[-1]), sep="\n", flush=True)
    path = options.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"context": about, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
