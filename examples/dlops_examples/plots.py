"""Learning curves."""

from pathlib import Path
from typing import Any

import matplotlib

from .logs import History

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


def learning_curves(path: Path, title: str, histories: dict[str, History]) -> None:
    """Loss and accuracy by epoch as a PNG; each further history is laid over the first."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 3, "alpha": 0.5, "marker": "o"},
        {"linewidth": 1, "linestyle": "--", "marker": "x"},
    )
    for panel, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for (name, history), style in zip(histories.items(), styles, strict=False):
            epochs = [row["epoch"] for row in history]
            for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
                values = [row[f"{split}_{quantity}"] for row in history]
                panel.plot(epochs, values, color=color, label=f"{split}, {name}", **style)
        panel.set(xlabel="epoch", ylabel=quantity)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
