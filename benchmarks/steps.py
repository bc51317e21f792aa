"""``python -m benchmarks.steps``: whole training steps of the example networks, a table.

Forward, loss, backward and optimizer, with the network on torch.nn and converted to dlops, from the
same parameters and on the same images, in turn.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from dlops_examples import allocator, builders, impl, networks, recipes
from dlops_examples.recipes import Recipe
from torch import Tensor, nn
from torch.nn import functional as F

from .layouts import LAYOUTS
from .machine import ROOT, context, describe
from .timing import Budget, interleave, keep_pages_mapped

NAMES = ("lenet_alexnet", "mnist_cnn", "vanilla", "adam_cnn", "deep_bn", "resnet32")
CPU = torch.device("cpu")
# How far the losses of a few steps may lie apart: roundings grow with the network's depth. A loss
# of bfloat16, around 2.3, has itself steps of 0.016.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
HEAD = """# Whole training steps

Forward, loss, backward and optimizer of the example networks at their recipes' batch sizes for real
data, random images, dropout off so that both sides compute the same; medians in ms with half of the
interquartile range, native and dlops in turn. `python -m benchmarks.steps` writes this page.

| network | dtype | layout | batch | torch.nn | dlops | torch.nn / dlops |
|---|---|---|---:|---:|---:|---:|
"""


class Training:
    """One side's network, which steps on the same batch again and again."""

    def __init__(self, recipe: Recipe, side: str, dtype: torch.dtype, layout: str) -> None:
        torch.manual_seed(0)
        channels, size = (1, 28) if recipe.name == "mnist_cnn" else (3, 32)
        model = networks.build(channels=channels, size=size, classes=10, **recipe.network)
        memory_format = LAYOUTS[layout]
        self.model = impl.place(model.to(dtype, memory_format=memory_format), side)
        for module in self.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # its random numbers would set the sides apart
        self.optimizer = builders.build(
            torch.optim, recipe.optimizer, "optimizer", self.model.parameters()
        )
        images = torch.randn(recipe.batch_size, channels, size, size, dtype=dtype)
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = torch.randint(10, (recipe.batch_size,))

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def compare(name: str, dtype: torch.dtype, layout: str, budget: Budget) -> tuple[int, dict, float]:
    recipe = recipes.load(name, {"data.name": "mnist" if name == "mnist_cnn" else "cifar10"})
    sides = {side: Training(recipe, side, dtype, layout) for side in impl.IMPLS}
    losses = {
        side: torch.stack([training.step() for _ in range(2)]) for side, training in sides.items()
    }
    apart = (losses["dlops"] - losses["torch"]).abs().max().item()
    allowed = AGREEMENT[dtype]
    assert apart <= allowed, f"{name}: the losses lie {apart:.2g} apart, allowed {allowed:.2g}"
    steps: dict[str, Callable[[], Tensor]] = {side: t.step for side, t in sides.items()}
    times = interleave(steps, CPU, budget)
    return recipe.batch_size, times, times["torch"]["median_s"] / times["dlops"]["median_s"]


def rows(options: argparse.Namespace) -> Iterator[str]:
    for name in options.only:
        for dtype in options.dtype:
            for layout in LAYOUTS:
                batch, times, ratio = compare(
                    name, getattr(torch, dtype), layout, Budget(options.seconds, 9)
                )
                cells = [name, dtype, layout, str(batch)]
                for side in ("torch", "dlops"):
                    median, spread = times[side]["median_s"], times[side]["iqr_s"]
                    cells.append(f"{median * 1e3:.2f} ±{50 * spread / median:.0f}%")
                yield f"| {' | '.join([*cells, f'{ratio:.2f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.steps", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the networks")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--seconds", type=float, default=3.0, help="for each row (default: 3)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "steps.md")
    options = parser.parse_args()
    keep_pages_mapped()
    about = describe(context(CPU)).splitlines()  # before its own load counts
    lines = []
    for line in rows(options):
        lines.append(line)
        print(line, flush=True)
    options.out.write_text(HEAD + "\n".join(lines) + "\n\n" + "\n".join(about) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    main()
