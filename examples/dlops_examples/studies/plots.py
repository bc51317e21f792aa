"""The studies' pictures."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..logs import History

Panels = Sequence[Any]


def subplots(count: int) -> tuple[Figure, Panels]:
    """A figure with ``count`` panels side by side, each with a grid."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    return figure, panels


def grouped_bars(groups: dict[str, list[list[float]]], classes: Sequence[str]) -> Figure:
    """One bar a class for every label: the mean over runs, with the range of the runs."""
    figure, (panel,) = subplots(1)
    width = 0.8 / len(groups)
    colors = colormaps["viridis"].resampled(len(groups))
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
    panel.legend(ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    return figure


def curves(pairs: dict[str, tuple[History, History]], names: tuple[str, str]) -> Figure:
    """Training loss and test accuracy by epoch: a colour for each pair, its second run dashed."""
    figure, panels = subplots(2)
    for panel, key in zip(panels, ("train_loss", "test_accuracy"), strict=True):
        for i, (label, pair) in enumerate(pairs.items()):
            for name, history, style in zip(names, pair, ("-", "--"), strict=True):
                epochs, values = [row["epoch"] for row in history], [row[key] for row in history]
                panel.plot(epochs, values, style, color=f"C{i}", label=f"{label}, {name}")
        panel.set(xlabel="epoch", ylabel=key.replace("_", " "))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    return figure


def sweep(accuracies: dict[float, list[float]], best: float, history: History) -> Figure:
    """Accuracy over a parameter's values, and the accuracy by epoch at the best of them."""
    figure, panels = subplots(2)
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
    return figure


def grouped_points(groups: dict[str, list[tuple[str, float]]]) -> Figure:
    """Accuracy of named networks, side by side, one colour and one line a group."""
    figure, (panel,) = subplots(1)
    start = 0
    labels: list[str] = []
    for group, points in groups.items():
        positions = range(start, start + len(points))
        panel.plot(positions, [accuracy for _, accuracy in points], marker="o", label=group)
        labels += [label for label, _ in points]
        start += len(points)
    panel.set_xticks(range(start), labels, rotation=20, ha="right")
    panel.set(xlabel="units of the hidden layers", ylabel="test accuracy")
    panel.legend()
    return figure
