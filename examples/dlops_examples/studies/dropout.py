"""Dropout: test accuracy at ten probabilities from 0 to 1, and a full run at the best."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..study_networks import check_mnist_cnn
from ..trainer import Trainer
from . import plots
from .study import Study, Table, command, parser


@dataclass(frozen=True)
class Setting:
    epochs: int  # of each run of the sweep
    seeds: int


SETTINGS = {"digits": Setting(2, 3), "mnist": Setting(1, 1), "cifar10": Setting(1, 1)}


def build_parser() -> argparse.ArgumentParser:
    result = parser("dropout.py", __doc__ or "", SETTINGS)
    add = result.add_argument
    add("--points", type=int, default=10, help="equally spaced probabilities in [0, 1]")
    add("--sweep-epochs", type=int, help="of each run of the sweep (default: by --data)")
    add("--seeds", type=int, help="runs of each probability (default: by --data)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("dropout", build_parser(), run, arguments)


def run(study: Study) -> None:
    options = study.options
    setting = SETTINGS[options.data]
    epochs = setting.epochs if options.sweep_epochs is None else options.sweep_epochs
    seeds = setting.seeds if options.seeds is None else options.seeds
    if options.points < 2 or seeds < 1:
        raise UsageError(f"--points must be at least 2 and --seeds 1: {options.points}, {seeds}")
    accuracies: dict[float, list[float]] = {}
    for p in torch.linspace(0, 1, options.points, dtype=torch.float64).tolist():
        recipe = study.recipe("mnist_cnn", {"network.dropout": p}, epochs=epochs)
        accuracies[p] = [
            study.train(f"p-{p:.3f}-{seed}", recipe, seed, check).accuracy for seed in range(seeds)
        ]
    best = max(accuracies, key=lambda p: statistics.fmean(accuracies[p]))
    recipe = study.recipe("mnist_cnn", {"network.dropout": best})
    full = study.train("best", recipe, 0, check)
    plots.sweep(study.folder / "accuracy_by_p.png", accuracies, best, full.history)
    study.finish(
        {
            "sweep": sweep(accuracies),
            "full": best_run(best, [r["test_accuracy"] for r in full.history]),
        }
    )


def check(trainer: Trainer) -> None:
    check_mnist_cnn(trainer.model)


def sweep(accuracies: dict[float, list[float]]) -> Table:
    rows = [
        [f"{p:.3f}", statistics.fmean(values), f"{min(values):.4f} to {max(values):.4f}"]
        for p, values in accuracies.items()
    ]
    return Table(["dropout p", "test accuracy", "range over seeds"], rows, digits=4)


def best_run(p: float, accuracy: list[float]) -> Table:
    rows = [[f"p = {p:.3f}", len(accuracy), accuracy[-1], max(accuracy)]]
    return Table(["full run", "epochs", "test accuracy", "best epoch"], rows, digits=4)
