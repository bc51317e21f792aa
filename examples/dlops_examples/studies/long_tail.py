"""Long-tailed data: cross entropy against focal and class-balanced focal loss."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlops.nn import ClassBalancedFocalLoss, FocalLoss

from .. import imbalance
from ..data import Images
from ..errors import UsageError
from ..trainer import Trainer
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


SETTINGS = {
    "digits": Setting("long_tail_digits", 140, 1.5, (0.9, 0.99, 0.999)),
    "mnist": Setting("long_tail_digits", 5000, 1.5, (0.99, 0.999, 0.9999)),
    "cifar10": Setting("resnet32", 5000, 0.0, (0.99, 0.999, 0.99999)),
}


@dataclass(frozen=True)
class Loss:
    label: str
    name: str
    beta: float = 0.0

    def build(self, counts: list[int], gamma: float) -> nn.Module:
        """A function of logits (N, C) and labels (N), on dlops' kernels."""
        if self.name == "ce":
            return FocalLoss(gamma=0.0)
        if self.name == "focal":
            return FocalLoss(gamma=gamma)
        return ClassBalancedFocalLoss(counts, self.beta, gamma, form=self.name)


def losses(names: Sequence[str], betas: Sequence[float]) -> list[Loss]:
    plain = {"ce": Loss("CE", "ce"), "focal": Loss("focal", "focal")}
    chosen = [plain[name] for name in plain if name in names]
    for name in ("softmax", "sigmoid"):
        if name in names:
            chosen += [Loss(f"CB {name} β={beta:g}", name, beta) for beta in betas]
    return chosen


def build_parser() -> argparse.ArgumentParser:
    result = parser("long_tail.py", __doc__ or "", SETTINGS)
    add = result.add_argument
    names = ("ce", "focal", "softmax", "sigmoid")
    add("--losses", nargs="+", choices=names, default=names, help="the last two: class-balanced")
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
    options.head = setting.head if options.head is None else options.head
    options.sigma = setting.sigma if options.sigma is None else options.sigma
    options.betas = list(setting.betas if options.betas is None else options.betas)
    if options.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {options.seeds}")
    recipe = study.recipe(setting.recipe)
    counts: list[int] = []
    accuracies: dict[str, list[list[float]]] = {}  # of every loss, seed and class
    for loss in losses(options.losses, options.betas):
        accuracies[loss.label] = []
        for seed in range(options.seeds):

            def prepare(trainer: Trainer, loss: Loss = loss, seed: int = seed) -> None:
                nonlocal counts
                counts = make_long_tailed(trainer, options, seed)
                trainer.loss = loss.build(counts, options.gamma).to(trainer.device)

            name = f"{loss.name}-{loss.beta:g}-{seed}"
            outcome = study.train(name, recipe, seed, prepare)
            accuracies[loss.label].append(
                imbalance.accuracy_by_class(outcome.predictions, outcome.labels, len(counts))
            )
    study.folder.mkdir(parents=True, exist_ok=True)
    plots.grouped_bars(
        study.folder / "accuracy_by_class.png",
        {label: seeds for label, seeds in accuracies.items() if "sigmoid" not in label},
        [f"{label}\n{count}" for label, count in enumerate(counts)],
    )
    study.finish(
        {"by class": by_class(accuracies, counts), "summary": summary(accuracies)},
        counts=counts,
        accuracies=accuracies,
    )


def make_long_tailed(trainer: Trainer, options: argparse.Namespace, seed: int) -> list[int]:
    """Thin out the trainer's classes, put noise on its images; the training samples per class."""
    images = trainer.images
    counts = imbalance.class_counts(options.head, options.factor, len(images.classes))
    train = imbalance.subsample(images.train, counts, seed)
    trainer.images = Images(train, imbalance.with_noise(images.test, options.sigma), images.classes)
    if options.sigma:
        trainer.model.register_forward_pre_hook(fresh_noise(options.sigma))
    return counts


def fresh_noise(sigma: float) -> Any:
    """Other noise on every image of every step; none where the network is evaluated."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (images,) = inputs
        return (images + sigma * torch.randn_like(images) if module.training else images,)

    return hook


def by_class(accuracies: dict[str, list[list[float]]], counts: list[int]) -> Table:
    """Accuracy of each class, mean over the seeds, in the layout of the published table."""
    rows: list[list[Any]] = [["training samples", *counts]]
    for label, seeds in accuracies.items():
        means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        rows.append([label, *means])
    return Table(["loss", *map(str, range(len(counts)))], rows)


def summary(accuracies: dict[str, list[list[float]]]) -> Table:
    """Head, tail, mean and worst class: mean over the seeds, and their standard deviation."""

    def spread(values: list[float]) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"

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
