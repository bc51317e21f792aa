"""The command line, and a run from its first case to the files that it writes."""

import argparse
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import bench_conv2d, bench_focal_loss, bench_max_pool2d, bench_unfold, plot, report
from .check import Baseline
from .harness import Case, Disagreement, measure
from .machine import ROOT, context, describe
from .roofline import Limits
from .timing import Budget, keep_pages_mapped

OPS = {
    "conv2d": bench_conv2d.cases,
    "max_pool2d": bench_max_pool2d.cases,
    "focal_loss": bench_focal_loss.cases,
    "unfold": bench_unfold.cases,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Time dlops against native.")
    add = parser.add_argument
    add("--only", nargs="+", choices=OPS, default=list(OPS), help="some of the ops")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--quick", action="store_true", help="one small case an op, to see that all works")
    add("--full", action="store_true", help="layers at batch 1, 8, 32 and 128; 200,000 classes")
    add("--seconds", type=float, default=0.8, help="for each pass of each case (default: 0.8)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--high", action="store_true", help="float32 at matmul precision 'high' (GPU: TF32)")
    add("--show", type=Path, metavar="RESULTS.json", help="print a run's tables, time nothing")
    add(
        "--check",
        type=Path,
        metavar="RESULTS.json",
        help="shortly; names what is slower than there",
    )
    add("--out", type=Path, help="path of the results without suffix (default: by what is run)")
    return parser


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    if options.show:
        results = json.loads(options.show.read_text())
        print(describe(results["context"]), report.show(results["rows"]), sep="\n")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    device = torch.device(options.device)
    prepare(device, options)
    about = context(device)
    print(describe(about))
    limits = Limits(device)
    if options.check:
        return check_against(Baseline(options.check), options, device, limits)
    budget = Budget(0.02, 3) if options.quick else Budget(options.seconds, 9)
    rows: list[report.Row] = []
    disagreements: list[str] = []
    try:
        for dtype in options.dtype:
            for row in run(select(options), device, dtype, limits, budget, disagreements):
                rows.append(row)
    finally:  # what there is by then, where it is interrupted
        if rows:
            print(report.means(rows))
            write(output_path(options), {"context": about, "limits": limits.measured, "rows": rows})
        for text in disagreements:
            print(f"DISAGREES, not timed: {text}")
    return 1 if disagreements else 0


def check_against(
    baseline: Baseline, options: argparse.Namespace, device: torch.device, limits: Limits
) -> int:
    options.no_compile = True
    torch.set_num_threads(options.threads or baseline.threads)
    count = bad = 0
    for dtype in options.dtype:
        for case in filter(lambda case: baseline.holds(case, dtype), select(options)):
            once = partial(measure, case, device, getattr(torch, dtype), limits, Budget(0.1, 5))
            try:
                lines = [f"SLOWER {line}" for line in baseline.regressions(once)]
            except Disagreement as error:
                lines = [f"DISAGREES {case.op} {case.name} {case.layout} {dtype}: {error}"]
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
            count += 1
            bad += len(lines)
    print(f"{count} cases, {bad} slower than at {baseline.commit[:8]}, or wrong")
    return 1 if bad or not count else 0


def prepare(device: torch.device, options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = options.high
    torch.set_float32_matmul_precision("high" if options.high else "highest")
    if device.type == "cpu":
        keep_pages_mapped()


def select(options: argparse.Namespace) -> Iterator[Case]:
    scope = "quick" if options.quick else "full" if options.full else "default"
    extra = {
        "conv2d": {"on_gpu": options.device == "cuda"},
        "focal_loss": {"compiled": not options.no_compile},
    }
    for name in options.only:
        yield from OPS[name](scope, **extra.get(name, {}))


def run(
    cases: Iterable[Case],
    device: torch.device,
    dtype: str,
    limits: Limits,
    budget: Budget,
    disagreements: list[str],
) -> Iterator[report.Row]:
    """Print a table for each op as its rows come in."""
    op = None
    for case in cases:
        if case.op != op:
            op = case.op
            print(report.header(op, dtype), flush=True)
        try:
            for row in measure(case, device, getattr(torch, dtype), limits, budget):
                print(report.line(row), flush=True)
                yield row
        except Disagreement as error:
            disagreements.append(f"{case.op} {case.name} {case.layout} {dtype}: {error}")


def output_path(options: argparse.Namespace) -> Path:
    if options.out:
        return options.out
    parts = [options.device, *options.dtype]
    parts += [] if options.only == list(OPS) else options.only
    parts += [scope for scope in ("quick", "full", "high") if getattr(options, scope)]
    return ROOT / "benchmarks" / "results" / "-".join(parts)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    title = describe(results["context"])
    plot.speedups(path.with_suffix(".png"), results["rows"], title)
    print(f"\nwritten: {path.with_suffix('.json')}, {path.with_suffix('.png')}")
