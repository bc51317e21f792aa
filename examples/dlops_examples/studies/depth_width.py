"""Depth against width: MLPs that share a budget of hidden units out over one to four layers."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from . import plots
from .limits import check_budget
from .study import Study, Table, command, parser


@dataclass(frozen=True)
class Budget:
    units: int
    layers: int  # at least
    published: float  # test accuracy that the published network of this budget had on MNIST
    target: float  # and what was asked for


BUDGETS = {
    b.units: b
    for b in (
        Budget(100, 1, 0.9777, 0.975),
        Budget(200, 2, 0.9824, 0.980),
        Budget(1000, 3, 0.9836, 0.983),
    )
}
DEEPEST = 4


def network(text: str) -> tuple[int, tuple[int, ...]]:
    """``200:120,80`` as a budget and the units of each hidden layer."""
    if not re.fullmatch(r"\d+:\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"expected BUDGET:UNITS,..., such as 200:120,80, got {text!r}"
        )
    budget, units = text.split(":")
    return int(budget), tuple(int(count) for count in units.split(","))


def build_parser() -> argparse.ArgumentParser:
    result = parser("depth_width.py", __doc__ or "", ("digits", "mnist"))
    add = result.add_argument
    add("--budgets", nargs="+", type=int, default=list(BUDGETS), help="hidden units of a network")
    add(
        "--network",
        type=network,
        action="append",
        metavar="BUDGET:UNITS",
        help="hidden layers such as 200:120,80, instead of equal ones; can be repeated",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("depth_width", build_parser(), run, arguments)


def equal_layers(budget: int) -> list[tuple[int, ...]]:
    """The budget in 1, 2, ... equal layers, from the fewest that are allowed for it."""
    fewest = BUDGETS[budget].layers if budget in BUDGETS else 1
    if budget < DEEPEST:
        raise UsageError(f"--budgets must be at least {DEEPEST} hidden units, got {budget}")
    return [(budget // depth,) * depth for depth in range(fewest, DEEPEST + 1)]


def run(study: Study) -> None:
    options = study.options
    chosen = options.network or [(b, units) for b in options.budgets for units in equal_layers(b)]
    for budget, units in chosen:  # all of them, before the first is trained
        check_budget(units, budget, BUDGETS[budget].layers if budget in BUDGETS else 1)
    rows = []
    accuracies: dict[str, list[tuple[str, float]]] = {}
    for budget, units in chosen:
        text = "-".join(map(str, units))
        recipe = study.recipe("mlp", {"network.units": list(units)})
        trainer = study.trainer(f"{budget} units as {text}", recipe, options.seed)
        last = study.fit(trainer)["test_accuracy"]
        known = BUDGETS.get(budget)
        published = f"{known.published:.4f} (asked: {known.target:.3f})" if known else ""
        rows.append([budget, len(units), text, last, trainer.best["test_accuracy"], published])
        accuracies.setdefault(f"at most {budget} units", []).append((text, last))
    headers = ["budget", "layers", "units", "last epoch", "best epoch", "published (MNIST)"]
    study.finish(
        {"networks": Table(headers, rows, digits=4)},
        {"accuracy_by_depth.png": plots.grouped_points(accuracies)},
    )
