"""``python -m benchmarks.accuracy``: errors of every op and dtype beside native's, as a table."""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accuracy import measure, problems
from tolerances import DTYPES, Errors

from .machine import ROOT, context, describe

HEAD = """# Errors beside native's

In units of the dtype's epsilon times the largest magnitude of the true result (for convolution: of
the sums of the terms' magnitudes), computed in 80-bit numbers: the largest error and the root mean
square. Each is the worst over value and gradients and, for the losses, over gamma 0, 0.5, 2 and
3.7; "not finite": NaN or infinity where the truth is finite. `python -m benchmarks.accuracy` writes
this page; tests/test_accuracy.py holds every one of its results to native's.

| dtype | op | inputs | dlops largest | native largest | dlops RMS | native RMS |
|---|---|---|---:|---:|---:|---:|
"""

Row = tuple[str, str, str]


def rows() -> dict[Row, list[Errors]]:
    """The worst errors of dlops and of native, by dtype, op and inputs."""
    found: dict[Row, list[tuple[Errors, Errors]]] = defaultdict(list)
    for dtype in DTYPES:
        for problem in problems(dtype):
            op = re.sub(r" gamma=[^,]+", "", problem.op)
            row = (str(dtype).removeprefix("torch."), op, problem.inputs_of)
            found[row] += [(ours, theirs) for _, ours, theirs in measure(problem, dtype)]
    return {row: [worst(side) for side in zip(*pairs, strict=True)] for row, pairs in found.items()}


def worst(errors: tuple[Errors, ...]) -> Errors:
    return Errors(*(max(values) for values in zip(*errors, strict=True)))


def shown(error: float) -> str:
    return f"{error:.2f}" if np.isfinite(error) else "not finite"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__)
    default = ROOT / "benchmarks" / "results" / "accuracy.md"
    parser.add_argument("--out", type=Path, default=default, help="the page to write")
    out = parser.parse_args().out
    torch.set_num_threads(2)
    lines = [
        f"| {' | '.join(row)} | {shown(ours.largest)} | {shown(theirs.largest)} "
        f"| {shown(ours.rms)} | {shown(theirs.rms)} |"
        for row, (ours, theirs) in rows().items()
    ]
    about = describe(context(torch.device("cpu"))).splitlines()[:3]
    out.write_text(HEAD + "\n".join(lines) + "\n\n" + "\n".join(about) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
