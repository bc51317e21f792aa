"""``python -m benchmarks.calls``: what a call costs where there is next to nothing to work out.

Microseconds of native and of dlops on the smallest inputs, in turn: forward without a gradient, and
forward + backward.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as native
import torchvision.ops
from torch import Tensor

import dlops.functional as F

from .harness import forward_backward
from .machine import ROOT, context, describe
from .timing import Budget, interleave

CPU = torch.device("cpu")
HEAD = """# Tiny calls

Microseconds on inputs with next to nothing to work out, medians, in turn in one process.
`python -m benchmarks.calls` writes this page.

| call | pass | native | dlops | dlops / native |
|---|---|---:|---:|---:|
"""


def leaf(*size: int) -> Tensor:
    return torch.randn(size, requires_grad=True)


def problems() -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """(name, native, dlops, inputs)"""
    torch.manual_seed(0)

    def both(name: str, inputs: list[Tensor], *args: Any, **options: Any) -> Any:
        def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *tensors: function(*tensors, *args, **options)

        text = ", ".join(map("x".join, ([str(n) for n in t.shape] for t in inputs)))
        return f"{name}({text})", call(getattr(native, name)), call(getattr(F, name)), inputs

    yield both("conv2d", [leaf(1, 1, 8, 8), leaf(1, 1, 3, 3), leaf(1)], padding=1)
    yield both("conv2d", [leaf(1, 4, 8, 8), leaf(4, 4, 3, 3), leaf(4)], padding=1)
    yield both("conv2d", [leaf(1, 4, 8, 8), leaf(4, 4, 1, 1)])
    yield both("max_pool2d", [leaf(1, 1, 4, 4)], 2)
    yield both("unfold", [leaf(1, 1, 4, 4)], 2)
    yield both("fold", [leaf(1, 4, 9)], (4, 4), 2)
    logits, target = leaf(2, 4), torch.tensor([0, 3])
    yield (
        "cross_entropy / focal_loss(gamma=0)(2x4)",
        lambda x: native.cross_entropy(x, target),
        lambda x: F.focal_loss(x, target, gamma=0.0),
        [logits],
    )
    labels = torch.tensor([[0.0, 1.0]])
    yield (
        "sigmoid_focal_loss(1x2)",
        lambda x: torchvision.ops.sigmoid_focal_loss(x, labels, reduction="mean"),
        lambda x: F.sigmoid_focal_loss(x, labels, reduction="mean"),
        [leaf(1, 2)],
    )


def without_gradient(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Tensor]:
    plain = [x.detach() for x in inputs]
    return lambda: function(*plain)


def rows(seconds: float) -> Iterator[tuple[str, float]]:
    """A line of the table, and dlops' time over native's."""
    for name, theirs, mine, inputs in problems():
        contenders = {"native": theirs, "dlops": mine}
        outputs = {side: function(*inputs).detach() for side, function in contenders.items()}
        torch.testing.assert_close(outputs["dlops"], outputs["native"])
        grad_output = torch.randn_like(outputs["native"])
        passes = {
            "forward": {k: without_gradient(f, inputs) for k, f in contenders.items()},
            "forward + backward": {
                k: forward_backward(f, inputs, grad_output) for k, f in contenders.items()
            },
        }
        for label, steps in passes.items():
            times = interleave(steps, CPU, Budget(seconds, 5))
            native_us, us = (times[side]["median_s"] * 1e6 for side in ("native", "dlops"))
            ratio = us / native_us
            yield f"| {name} | {label} | {native_us:.1f} | {us:.1f} | {ratio:.2f} |", ratio


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.calls", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "calls.md", help="the page"
    )
    options = parser.parse_args()
    lines = []
    for line, _ in rows(options.seconds):
        print(line, flush=True)
        lines.append(line)
    options.out.write_text(HEAD + "\n".join(lines) + f"\n\n{describe(context(CPU))}\n")
    print("written:", options.out)


if __name__ == "__main__":
    main()
