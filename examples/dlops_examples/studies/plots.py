"""The studies' pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from ..plots import History

DPI = 90


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def grouped_bars(path: Path, groups: dict[str, list[list[float]]], classes: Sequence[str]) -> None:
    """One bar a class for every label: the mean over runs, with the range of the runs."""
    figure, panel = plt.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(groups)
    colors = plt.get_cmap("viridis").resampled(len(groups))
    for i, (label, runs) in enumerate(groups.items()):
        columns = list(zip(*runs, strict=True))
        means = [statistics.fmean(values) for values in columns]
        below = [mean - min(values) for mean, values in zip(means, columns, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, columns, strict=True)]
        positions = [k - 0.4 + (i + 0.5) * width for k in range(len(columns))]
        panel.bar(positions, means, width, label=label, color=colors(i))
        panel.errorbar(positions, means, (below, above), fmt="none", ecolor="gray", elinewidth=0.8)
    panel.set_xticks(range(len(classes)), classes)
    panel.set(xlabel="class, and its training samples", ylabel="test accuracy", ylim=(0, 1))
    panel.grid(axis="y", alpha=0.3)
    panel.legend(ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    save(figure, path)


def curves(path: Path, histories: dict[str, History], title: str = "") -> None:
    """Training loss and test accuracy by epoch, one colour a label.

    Labels that end in "without BN" are dashed, in the colour of the label before them.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key in zip(panels, ("train_loss", "test_accuracy"), strict=True):
        for i, (label, history) in enumerate(histories.items()):
            dashed = label.endswith("without BN")
            panel.plot(
                [row["epoch"] for row in history],
                [row[key] for row in history],
                color=f"C{i // 2}" if "BN" in label else f"C{i}",
                linestyle="--" if dashed else "-",
                marker=".",
                label=label,
            )
        panel.set(xlabel="epoch", ylabel=key.replace("_", " "))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def sweep(path: Path, accuracies: dict[float, list[float]], best: float, history: History) -> None:
    """Accuracy over a parameter's values, and the accuracy by epoch at the best of them."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    values = list(accuracies)
    panels[0].plot(values, [statistics.fmean(accuracies[p]) for p in values], marker="o")
    panels[0].fill_between(
        values,
        [min(accuracies[p]) for p in values],
        [max(accuracies[p]) for p in values],
        alpha=0.2,
    )
    panels[0].set(xlabel="dropout p", ylabel="test accuracy, mean and range", ylim=(0, 1))
    epochs = [row["epoch"] for row in history]
    for split in ("train", "test"):
        accuracy = [row[f"{split}_accuracy"] for row in history]
        panels[1].plot(epochs, accuracy, marker=".", label=split)
    panels[1].set(xlabel=f"epoch, p = {best:.3f}", ylabel="accuracy")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    save(figure, path)


def grouped_points(path: Path, groups: dict[str, list[tuple[str, float]]]) -> None:
    """Accuracy of named networks, side by side, one colour and one line a group."""
    figure, panel = plt.subplots(figsize=(10, 4), layout="constrained")
    start = 0
    labels: list[str] = []
    for group, points in groups.items():
        positions = range(start, start + len(points))
        panel.plot(positions, [accuracy for _, accuracy in points], marker="o", label=group)
        labels += [label for label, _ in points]
        start += len(points)
    panel.set_xticks(range(start), labels, rotation=20, ha="right")
    panel.set(xlabel="units of the hidden layers", ylabel="test accuracy")
    panel.grid(alpha=0.3)
    panel.legend()
    save(figure, path)
