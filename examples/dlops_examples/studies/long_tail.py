"""Long-tailed data: cross entropy against focal and class-balanced focal loss."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import imbalance
from ..data import Images
from ..errors import UsageError
from . import plots
from .study import Study, Table, command, parser

PART = 3  # classes in the head, and in the tail


@dataclass(frozen=True)
class Setting:
    """What is trained on a data set by default."""

    recipe: str
    head: int  # samples of the first class
    sigma: float  # standard deviation of the noise on images in [0, 1]
    # A beta matters where 1 / (1 - beta), the most that a class can count for, is among the counts.
    betas: tuple[float, ...]
    overrides: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "digits": Setting("long_tail_digits", 140, 1.5, (0.9, 0.99, 0.999)),
    "mnist": Setting("long_tail_digits", 5000, 1.5, (0.99, 0.999, 0.9999)),
    "cifar10": Setting("resnet32", 5000, 0.0, (0.99, 0.999, 0.99999), {"optimizer.lr": 0.005}),
}


# The names that --losses takes, and the recipe's names of those losses.
LOSSES = {
    "ce": "cross_entropy",
    "focal": "focal",
    "softmax": "class_balanced_softmax",
    "sigmoid": "class_balanced_sigmoid",
}
Accuracies = dict[str, list[list[float]]]  # of every loss, seed and class


def tables(names: Sequence[str], betas: Sequence[float], gamma: float) -> dict[str, dict[str, Any]]:
    """The chosen losses' labels and [loss] tables of the recipe."""
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in LOSSES if name in names):
        table = {"loss.name": LOSSES[name]} | ({"loss.gamma": gamma} if name != "ce" else {})
        if name in ("ce", "focal"):
            found["CE" if name == "ce" else name] = table
        else:
            found |= {f"CB {name} β={beta:g}": table | {"loss.beta": beta} for beta in betas}
    return found


def build_parser() -> argparse.ArgumentParser:
    result = parser("long_tail.py", __doc__ or "", SETTINGS)
    add = result.add_argument
    add(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=list(LOSSES),
        help="the last two: class-balanced",
    )
    add("--betas", nargs="+", type=float, help="of the class-balanced losses (default: by --data)")
    add("--gamma", type=float, default=1.0, help="of the focal losses (default: 1)")
    add("--factor", type=float, default=0.02, help="last class over first (default: 0.02)")
    add("--head", type=int, help="samples of the first class (default: by --data)")
    add("--sigma", type=float, help="noise on images in [0, 1] (default: by --data)")
    add("--seeds", type=int, default=3, help="runs of each loss (default: 3)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("long_tail", build_parser(), run, arguments)


def run(study: Study) -> None:
    options = study.options
    setting = SETTINGS[options.data]
    for name in ("head", "sigma", "betas"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(setting, name))
    if options.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {options.seeds}")
    noise = {"name": "GaussianNoise", "sigma": options.sigma, "clip": False}
    defaults = setting.overrides | ({"augment": [noise]} if options.sigma else {})
    images = study.images(study.recipe(setting.recipe))
    counts = imbalance.class_counts(options.head, options.factor, len(images.classes))
    test = imbalance.with_noise(images.test, options.sigma)
    accuracies: Accuracies = {}
    for label, loss in tables(options.losses, options.betas, options.gamma).items():
        recipe = study.recipe(setting.recipe, loss, **defaults)
        accuracies[label] = []
        for seed in range(options.seed, options.seed + options.seeds):
            train = imbalance.subsample(images.train, counts, seed)
            trainer = study.trainer(
                f"{label}, seed {seed}", recipe, seed, Images(train, test, images.classes)
            )
            accuracies[label].append(study.fit(trainer)["test_class_accuracy"])
    ticks = [f"{name}\n{count}" for name, count in zip(images.classes, counts, strict=True)]
    study.finish(
        {"by class": by_class(accuracies, counts), "summary": summary(accuracies)},
        {"accuracy_by_class.png": plots.grouped_bars(accuracies, ticks)},
        counts=counts,
        accuracies=accuracies,
    )


def by_class(accuracies: Accuracies, counts: list[int]) -> Table:
    """Accuracy of each class, mean over the seeds, in the layout of the published table."""
    rows: list[list[Any]] = [["training samples", *counts]]
    for label, seeds in accuracies.items():
        means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        rows.append([label, *means])
    return Table(["loss", *map(str, range(len(counts)))], rows)


def summary(accuracies: Accuracies) -> Table:
    """Head, tail, mean and worst class: mean over the seeds, and their standard deviation."""

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{deviation}"

    rows = [
        [
            label,
            spread([statistics.fmean(classes[:PART]) for classes in seeds]),
            spread([statistics.fmean(classes[-PART:]) for classes in seeds]),
            spread([statistics.fmean(classes) for classes in seeds]),
            spread([min(classes) for classes in seeds]),
        ]
        for label, seeds in accuracies.items()
    ]
    return Table(["loss", f"first {PART}", f"last {PART}", "mean", "worst class"], rows)
