"""``python -m benchmarks.threads``: what a second thread gains in convolution, a table.

One thread's time over two threads', in turn, of native and of dlops, forward + backward.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dlops_examples import allocator
from torch import Tensor

from .bench_conv2d import LAYERS, problem
from .harness import forward_backward
from .layouts import LAYOUTS
from .machine import ROOT, context, describe
from .timing import Budget, interleave, keep_pages_mapped

CPU = torch.device("cpu")
HEAD = """# Two threads

One thread's time over two threads', forward + backward in float32 of the layers of
`bench_conv2d.py` at their default batches, medians, in turn in one process.
`python -m benchmarks.threads` writes this page.

| layer | layout | native: ms on two | one / two | dlops: ms on two | one / two |
|---|---|---:|---:|---:|---:|
"""


def on(threads: int, step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(threads)
        return step()

    return run


def gains(times: dict[str, Any], side: str) -> tuple[float, float]:
    """Seconds on two threads, and what one takes over that."""
    one, two = (times[f"{side} {threads}"]["median_s"] for threads in (1, 2))
    return two, one / two


def rows(seconds: float) -> Iterator[tuple[str, float, float]]:
    for layer in LAYERS:
        for batch in layer.batches:
            for layout in LAYOUTS:
                torch.manual_seed(0)
                case = problem(layer, batch, layout, CPU, torch.float32)
                with torch.no_grad():
                    output: Tensor = case.contenders["native"](*case.inputs)
                grad_output = torch.randn_like(output)
                steps = {
                    f"{side} {threads}": on(
                        threads, forward_backward(function, case.inputs, grad_output)
                    )
                    for side, function in case.contenders.items()
                    for threads in (1, 2)
                }
                times = interleave(steps, CPU, Budget(seconds, 7))
                (native, native_gain), (ours, gain) = (
                    gains(times, side) for side in ("native", "dlops")
                )
                cells = f"{native * 1e3:.2f} | {native_gain:.2f} | {ours * 1e3:.2f} | {gain:.2f}"
                yield f"| {layer.name(batch)} | {layout} | {cells} |", native_gain, gain


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.threads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.8, help="for each row (default: 0.8)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "threads.md", help="the page"
    )
    options = parser.parse_args()
    keep_pages_mapped()
    lines, logs = [], []
    for line, *both in rows(options.seconds):
        print(line, flush=True)
        lines.append(line)
        logs.append(torch.tensor(both).log())
    native, ours = torch.stack(logs).mean(0).exp().tolist()
    mean = f"| geometric mean | | | {native:.2f} | | {ours:.2f} |"
    print(mean)
    page = HEAD + "\n".join([*lines, mean]) + f"\n\n{describe(context(CPU))}\n"
    options.out.write_text(page)
    print("written:", options.out)


if __name__ == "__main__":
    allocator.keep_freed_memory()
    main()
