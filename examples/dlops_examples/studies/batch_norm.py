"""Batch normalisation: the learning rates that a network bears with it and without it."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from ..logs import History
from . import plots
from .study import Study, Table, command, parser

# The digits bear higher rates than CIFAR-10, for which the recipe's is published, and learn faster.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 6, "optimizer.lr": 3e-4},
    "mnist": {},
    "cifar10": {},
}
Histories = dict[str, tuple[History, History]]  # of every rate: with batch norm, without


def build_parser() -> argparse.ArgumentParser:
    result = parser("batch_norm.py", __doc__ or "", DEFAULTS)
    add = result.add_argument
    add("--lr", type=float, help="the base learning rate (default: by --data)")
    add("--factors", nargs="+", type=float, default=[1, 5, 10, 30], help="of the base rate")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("batch_norm", build_parser(), run, arguments)


def run(study: Study) -> None:
    options = study.options
    defaults = DEFAULTS[options.data]
    base = options.lr
    if base is None:
        base = study.recipe("adam_cnn", **defaults).optimizer["lr"]
    if not base > 0 or not all(factor > 0 for factor in options.factors):
        raise UsageError("--lr and --factors must be positive")
    histories: Histories = {}
    for factor in options.factors:
        rate = base * factor
        pair = []
        for batch_norm in (True, False):
            varied = {"optimizer.lr": rate, "network.batch_norm": batch_norm}
            recipe = study.recipe("adam_cnn", varied, **defaults)
            name = f"lr {rate:g}, {'with' if batch_norm else 'without'} BN"
            trainer = study.trainer(name, recipe, options.seed)
            study.fit(trainer)
            pair.append(trainer.history)
        histories[f"{rate:g} (x{factor:g})"] = (pair[0], pair[1])
    study.finish(
        {"by rate": by_rate(histories), "speed": speed(histories)},
        {"curves.png": plots.curves(histories, ("with BN", "without"))},
    )


def by_rate(histories: Histories) -> Table:
    """Test accuracy after the last epoch, for every learning rate with and without BN."""
    rows = [
        [rate, *(history[-1]["test_accuracy"] for history in pair)]
        for rate, pair in histories.items()
    ]
    return Table(["learning rate", "with BN", "without BN"], rows, digits=4)


def speed(histories: Histories) -> Table:
    """The epoch at which each run with BN is as good as the network without at its end.

    That is the network at the first rate, the base of the others.
    """
    _, plain = next(iter(histories.values()))
    target = plain[-1]["test_accuracy"]
    rows = []
    for rate, (normalised, _) in histories.items():
        reached = (row["epoch"] for row in normalised if row["test_accuracy"] >= target)
        rows.append([rate, next(reached, "never")])
    headers = ["learning rate, with BN", f"epoch that reaches {target:.4f}, of {len(plain)}"]
    return Table(headers, rows)
