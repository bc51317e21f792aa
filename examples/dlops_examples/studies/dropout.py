"""Dropout: test accuracy at ten probabilities from 0 to 1, and a full run at the best."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..logs import History
from ..recipes import Recipe
from . import plots
from .limits import check_mnist_cnn
from .study import Study, Table, command, parser


@dataclass(frozen=True)
class Setting:
    epochs: int  # of each run of the sweep
    seeds: int


SETTINGS = {"digits": Setting(2, 3), "mnist": Setting(1, 1)}


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
        recipe = study.recipe("mnist_cnn", {"network.dropout": p, "epochs": epochs})
        accuracies[p] = [
            fit(study, f"p {p:.3f}, seed {seed}", recipe, seed)[-1]["test_accuracy"]
            for seed in range(options.seed, options.seed + seeds)
        ]
    best = max(accuracies, key=lambda p: statistics.fmean(accuracies[p]))
    recipe = study.recipe("mnist_cnn", {"network.dropout": best})
    history = fit(study, f"p {best:.3f}, full run", recipe, options.seed)
    study.finish(
        {"sweep": sweep(accuracies), "full": full(best, history)},
        {"accuracy_by_p.png": plots.sweep(accuracies, best, history)},
    )


def fit(study: Study, name: str, recipe: Recipe, seed: int) -> History:
    trainer = study.trainer(name, recipe, seed)
    check_mnist_cnn(trainer.model)
    study.fit(trainer)
    return trainer.history


def sweep(accuracies: dict[float, list[float]]) -> Table:
    rows = [
        [f"{p:.3f}", statistics.fmean(values), f"{min(values):.4f} to {max(values):.4f}"]
        for p, values in accuracies.items()
    ]
    return Table(["dropout p", "test accuracy", "range over seeds"], rows, digits=4)


def full(p: float, history: History) -> Table:
    accuracies = [row["test_accuracy"] for row in history]
    rows = [[f"p = {p:.3f}", len(accuracies), accuracies[-1], max(accuracies)]]
    return Table(["full run", "epochs", "last epoch", "best epoch"], rows, digits=4)
