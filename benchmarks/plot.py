"""The picture of a run: native's time over dlops', case by case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

COLORS = {"forward": "tab:blue", "forward+backward": "tab:orange"}


def speedups(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """One panel an op, two bars a case; right of the line at 1, dlops is the faster one."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    labels = {op: list(dict.fromkeys(_label(r) for r in rows if r["op"] == op)) for op in ops}
    heights = [len(labels[op]) + 1.5 for op in ops]
    figure, panels = plt.subplots(
        len(ops),
        1,
        figsize=(10, 1 + 0.32 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for op, panel in zip(ops, panels[:, 0], strict=True):
        for offset, (name, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
            chosen = [row for row in rows if row["op"] == op and row["pass"] == name]
            positions = [labels[op].index(_label(row)) + offset for row in chosen]
            values = [row["speedup"] for row in chosen]
            widths = [value - 1 for value in values]
            bars = panel.barh(positions, widths, left=1, height=0.4, color=color, label=name)
            panel.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6, padding=2)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_yticks(range(len(labels[op])), labels[op], fontsize=7)
        panel.set(title=op, xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="x", alpha=0.3)
        panel.set_ylim(len(labels[op]) - 0.4, -0.6)
        panel.margins(x=0.1)
    panels[0, 0].legend(fontsize=8)
    panels[-1, 0].set_xlabel("native's time / dlops' time")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(row: dict[str, Any]) -> str:
    return " ".join(filter(None, (row["case"], row["layout"], row["dtype"])))
