"""``python -m benchmarks.memory``: peak memory of forward + backward beside native's, a table."""

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peak import ALLOWED_PER_THREAD, SETTINGS, Problem, peak_of_forward_backward

from . import bench_focal_loss
from .bench_conv2d import Layer
from .bench_conv2d import problem as conv2d_problem
from .harness import Case
from .layouts import LAYOUTS
from .machine import ROOT, context, describe
from .run import OPS

HEAD = """# Peak memory beside native's

Forward and backward, MiB beyond the inputs, as tests/peak.py measures it: tensors, scratch memory
and what libraries take. Two threads; **bold**: more than native's plus 2 MiB a thread.
`python -m benchmarks.memory` writes this page.

| dtype | op | case | layout | native | dlops | difference |
|---|---|---|---|---:|---:|---:|
"""
DTYPES = ("float32", "bfloat16")
THREADS = 2
# What asks most of the scratch memory: very many outputs, very many classes, large weights.
EXTREMES = [
    Layer("wide", 64, 2048, 112, 1, batches=(2,)),
    Layer("wide", 512, 4096, 32, 1, batches=(2,)),
    Layer("wide", 16, 4096, 64, 3, padding=1, batches=(1,)),
    Layer("grouped", 512, 512, 14, 3, padding=1, groups=32, batches=(4,)),
    Layer("depthwise", 96, 96, 56, 7, padding=3, groups=96, batches=(4,)),
    Layer("heavy", 1024, 1024, 7, 3, padding=1, batches=(4,)),
]
ROWS = [(1, 32_000), (1, 128_000), (16, 128_000), (256, 128_000)]


def cases() -> Iterator[Case]:
    for name, of_op in OPS.items():
        yield from of_op("default", **({"compiled": False} if name == "focal_loss" else {}))
    for layer in EXTREMES:
        for layout in LAYOUTS:
            (batch,) = layer.batches
            build = partial(conv2d_problem, layer, batch, layout)
            yield Case("conv2d", layer.name(batch), layout, build)
    for rows, classes in ROWS:
        build = partial(bench_focal_loss.problem, "cross_entropy", rows, classes, False)
        yield Case("cross_entropy", f"{rows}x{classes}", "", build)


def build(case: Case, dtype: str, contender: str) -> Problem:
    torch.manual_seed(0)
    problem = case.build(torch.device("cpu"), getattr(torch, dtype))
    return problem.contenders[contender], problem.inputs


def row(case: Case, dtype: str) -> str:
    native, ours = (
        peak_of_forward_backward(partial(build, case, dtype, contender)) / 2**20
        for contender in ("native", "dlops")
    )
    difference = f"{ours - native:+.1f}"
    if ours - native > THREADS * ALLOWED_PER_THREAD / 2**20:
        difference = f"**{difference}**"
    cells = (dtype, case.op, case.name, case.layout, f"{native:.1f}", f"{ours:.1f}", difference)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__)
    default = ROOT / "benchmarks" / "results" / "memory.md"
    parser.add_argument("--out", type=Path, default=default, help="the page to write")
    out = parser.parse_args().out
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        # glibc reads them as a process starts.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **SETTINGS})
    torch.set_num_threads(THREADS)
    lines = []
    for dtype in DTYPES:
        for case in cases():
            lines.append(row(case, dtype))
            print(lines[-1], flush=True)
    about = describe(context(torch.device("cpu"))).splitlines()[:3]
    out.write_text(HEAD + "\n".join(lines) + "\n\n" + "\n".join(about) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
