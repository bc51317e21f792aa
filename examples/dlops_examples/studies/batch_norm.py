"""Batch normalisation: the learning rates that a network bears with it and without it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from . import plots
from .study import Outcome, Study, Table, command, parser


@dataclass(frozen=True)
class Setting:
    overrides: dict[str, Any]
    lr: float  # multiplied by each factor


SETTINGS = {
    "digits": Setting({"epochs": 8, "network.widths": [16, 32], "network.hidden": 128}, 1e-3),
    "mnist": Setting({}, 1e-4),
    "cifar10": Setting({}, 1e-4),
}


def build_parser() -> argparse.ArgumentParser:
    result = parser("batch_norm.py", __doc__ or "", SETTINGS)
    add = result.add_argument
    add("--lr", type=float, help="the base learning rate (default: by --data)")
    add("--factors", nargs="+", type=float, default=[1, 5, 10, 30], help="of the base rate")
    add("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("batch_norm", build_parser(), run, arguments)


def run(study: Study) -> None:
    options = study.options
    setting = SETTINGS[options.data]
    base = setting.lr if options.lr is None else options.lr
    if not base > 0 or not all(factor > 0 for factor in options.factors):
        raise UsageError("--lr and --factors must be positive")
    outcomes: dict[tuple[float, bool], Outcome] = {}
    for factor in options.factors:
        for batch_norm in (True, False):
            recipe = study.recipe(
                "adam_cnn",
                setting.overrides
                | {"optimizer.lr": base * factor, "network.batch_norm": batch_norm},
            )
            name = f"lr-{base * factor:g}-{'bn' if batch_norm else 'plain'}"
            outcomes[factor, batch_norm] = study.train(name, recipe, options.seed)
    plots.curves(
        study.folder / "curves.png",
        {
            f"lr {base * factor:g}, {'with' if batch_norm else 'without'} BN": outcome.history
            for (factor, batch_norm), outcome in outcomes.items()
        },
    )
    study.finish({"by rate": by_rate(outcomes, base), "speed": speed(outcomes, base)})


def by_rate(outcomes: dict[tuple[float, bool], Outcome], base: float) -> Table:
    """Test accuracy after the last epoch, for every learning rate with and without BN."""
    rows = [
        [f"{base * factor:g} (×{factor:g})"]
        + [outcomes[factor, batch_norm].accuracy for batch_norm in (True, False)]
        for factor in dict.fromkeys(factor for factor, _ in outcomes)
    ]
    return Table(["learning rate", "with BN", "without BN"], rows, digits=4)


def speed(outcomes: dict[tuple[float, bool], Outcome], base: float) -> Table:
    """The first epoch at which each run with BN is as good as the network without, at the end.

    That network's accuracy is the one at the base rate, or at the first factor given.
    """
    first = next(iter(outcomes))[0]
    target = outcomes[first, False].accuracy
    rows = []
    for (factor, batch_norm), outcome in outcomes.items():
        if batch_norm:
            reached = [r["epoch"] for r in outcome.history if r["test_accuracy"] >= target]
            rows.append([f"{base * factor:g} (×{factor:g})", reached[0] if reached else "never"])
    return Table(["learning rate, with BN", f"first epoch at {target:.4f} or more"], rows)
