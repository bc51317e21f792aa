"""A run's metrics as JSON, CSV and, if asked for, TensorBoard events."""

import csv
import io
from pathlib import Path
from typing import Any

from . import files
from .errors import UsageError

History = list[dict[str, Any]]


def save(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json with everything, metrics.csv with one line an epoch and no lists."""
    files.save_json(folder / "metrics.json", metrics)
    rows = [scalars(row) for row in metrics["history"]]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys() if rows else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.save_text(folder / "metrics.csv", table.getvalue())


def scalars(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not isinstance(value, list)}


class TensorBoard:
    """Event files in ``folder``; epochs from ``first_step`` on replace those of a resumed run."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(folder, purge_step=first_step)

    def add(self, row: dict[str, Any]) -> None:
        for key, value in scalars(row).items():
            if key != "epoch":
                split, _, quantity = key.partition("_")
                name = f"{quantity}/{split}" if split in ("train", "test") else key
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
