"""What the studies share: options, runs of a recipe, printed tables and the result file."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .. import data, files, recipes, study_networks  # noqa: F401
from ..cli import Parser
from ..errors import UsageError
from ..plots import History
from ..recipes import Recipe
from ..settings import Settings
from ..trainer import EVALUATION_BATCH, Trainer
from .machine import machine

Prepare = Callable[[Trainer], None]


@dataclass(frozen=True)
class Table:
    """Rows of numbers or text under headers; floats are shown with ``digits`` decimals."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 3

    def cells(self) -> list[list[str]]:
        def cell(value: Any) -> str:
            return f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)

        return [[cell(value) for value in row] for row in self.rows]

    def text(self, style: str = "simple") -> str:
        """As a table of tabulate's ``style``: "simple" for a terminal, "github" for Markdown."""
        align = ["left"] + ["right"] * (len(self.headers) - 1)
        return tabulate(
            self.cells(), self.headers, style, disable_numparse=True, colalign=align[: self.width]
        )

    @property
    def width(self) -> int:
        return len(self.headers) if self.rows else 0


@dataclass(frozen=True)
class Outcome:
    """What one run of a recipe gave."""

    name: str
    history: History
    model: nn.Module
    predictions: Tensor  # of the test images (N), by the network of the last epoch
    labels: Tensor  # (N)

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return (self.predictions == self.labels).float().mean().item()


@dataclass
class Study:
    """One study's runs, as its ``options`` say; everything it writes lies in ``folder``."""

    name: str
    options: argparse.Namespace
    started: float = field(default_factory=time.perf_counter)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.options.out / self.name

    def recipe(
        self, name: str, overrides: dict[str, Any] | None = None, epochs: int | None = None
    ) -> Recipe:
        """The recipe ``name`` with the study's overrides, then the command line's.

        ``epochs`` stands above both.
        """
        given = dict(recipes.parse_override(text) for text in self.options.set)
        if epochs is None:
            epochs = self.options.epochs
        if epochs is not None:
            given["epochs"] = epochs
        return recipes.load(name, (overrides or {}) | given)

    def train(
        self, name: str, recipe: Recipe, seed: int = 0, prepare: Prepare | None = None
    ) -> Outcome:
        """Train ``recipe`` as run ``name``; ``prepare`` may change data, loss or network first."""
        options = self.options
        settings = Settings(
            seed=seed,
            device=options.device,
            threads=options.threads,
            limit=options.limit,
            out=self.folder / "runs",
        )
        trainer = Trainer(replace(recipe, name=name), settings)
        if prepare:
            prepare(trainer)
        print(f"{name}:", file=sys.stderr)
        history = trainer.fit()
        predictions, labels = predict(trainer)
        outcome = Outcome(name, history, trainer.model, predictions, labels)
        self.outcomes.append(outcome)
        return outcome

    def finish(self, tables: dict[str, Table], **values: Any) -> None:
        """Print the tables, write results.json, and say where everything is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        result = {
            "study": self.name,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": vars(self.options),
            "machine": machine(),
            "seconds": time.perf_counter() - self.started,
            "tables": {
                key: {"headers": table.headers, "rows": table.cells()}
                for key, table in tables.items()
            },
            "runs": {outcome.name: outcome.history for outcome in self.outcomes},
            **values,
        }
        files.save_json(self.folder / "results.json", result)
        for table in tables.values():
            print(f"\n{table.text()}")
        written = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        print(f"\nwritten to {self.folder}: {', '.join(written)}")


def parser(script: str, description: str, datasets: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every study; each adds its own."""
    result = Parser(prog=script, description=description)
    add = result.add_argument
    add("--data", choices=list(datasets), default="digits", help="default: digits, embedded")
    add("--root", type=Path, default=Path("data"), help="where MNIST and CIFAR-10 lie")
    add("--download", action="store_true", help="download MNIST or CIFAR-10 to --root")
    add("--epochs", type=int, help="of every run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any value of the recipe")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--limit", type=int, help="train and test on at most so many images each")
    add("--out", type=Path, default=Path("runs"), help="parent of the study's folder")
    return result


def command(
    name: str,
    options_parser: argparse.ArgumentParser,
    run: Callable[[Study], None],
    arguments: Sequence[str] | None,
) -> int:
    """Run a study as the command line says; the exit code."""
    study = Study(name, options_parser.parse_args(arguments))
    try:
        run(study)
    except (UsageError, OSError) as error:
        options_parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished runs are in {study.folder / 'runs'}", file=sys.stderr)
        return 130
    return 0


@torch.no_grad()
def predict(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels of all test images, on the CPU: (N), (N)."""
    trainer.model.eval()
    predictions = [
        trainer.model(images.to(trainer.device)).argmax(1).cpu()
        for images, _ in data.batches(trainer.images.test, EVALUATION_BATCH)
    ]
    return torch.cat(predictions), trainer.images.test.tensors[1]
