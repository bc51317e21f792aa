"""What the studies share: options, runs of a recipe, printed tables and the result files."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from .. import cli, data, distributed, files, recipes
from ..errors import UsageError
from ..logs import History
from ..recipes import Recipe
from ..settings import Settings
from ..trainer import Trainer
from .machine import machine

PICTURE_DPI = 90


@dataclass(frozen=True)
class Table:
    """Rows of numbers or text under headers; floats are shown with ``digits`` decimals."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 3

    def text(self, style: str = "simple") -> str:
        """In one of tabulate's styles: "simple" for a terminal, "github" for Markdown."""
        cells = [[self._cell(value) for value in row] for row in self.rows]
        align = ["left"] + ["right"] * (len(self.headers) - 1)
        return tabulate(cells, self.headers, style, disable_numparse=True, colalign=align)

    def _cell(self, value: Any) -> str:
        return f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)


class Study:
    """One study's runs, as its ``options`` say; everything it writes lies in ``folder``."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        self.folder: Path = options.out / name
        self.started = time.perf_counter()
        self.runs: dict[str, History] = {}

    def recipe(self, name: str, varied: dict[str, Any] | None = None, **defaults: Any) -> Recipe:
        """The recipe ``name`` on --data: study's ``defaults``, then the command line's choices.

        ``varied`` is what the study is about, and stands above both.
        """
        given = dict(recipes.parse_override(text) for text in self.options.set)
        varied = varied or {}
        if clash := sorted(given.keys() & varied.keys()):
            raise UsageError(f"--set {clash[0]}: the study itself varies that")
        if self.options.epochs is not None:
            given["epochs"] = self.options.epochs
        return recipes.load(name, {"data.name": self.options.data} | defaults | given | varied)

    def images(self, recipe: Recipe) -> data.Images:
        """The data of ``recipe``, at most --limit images of each split."""
        images = data.load(**recipe.data, root=self.settings.root, download=self.settings.download)
        return images.limited(self.settings.limit) if self.settings.limit else images

    def trainer(
        self, name: str, recipe: Recipe, seed: int, images: data.Images | None = None
    ) -> Trainer:
        """A trainer that writes to the study's folder ``runs/<name>``, or resumes from there."""
        folder = self.folder / "runs" / name
        resume = self.settings.resume and (folder / "last.pt").is_file()
        limit = None if images else self.settings.limit
        settings = replace(self.settings, seed=seed, limit=limit, resume=resume)
        trainer = Trainer(replace(recipe, name=name), settings, images, folder)
        trainer.leave_bars = False
        return trainer

    def fit(self, trainer: Trainer) -> dict[str, Any]:
        """Train, print one line, and return the last epoch's metrics."""
        history = trainer.fit()
        name = trainer.recipe.name
        self.runs[name] = history
        seconds = sum(row["seconds"] for row in history)
        if trainer.processes.first:
            accuracy = history[-1]["test_accuracy"]
            print(f"{name:<26} test accuracy {accuracy:.4f} after {seconds:5.1f} s", flush=True)
        return history[-1]

    def finish(self, tables: dict[str, Table], pictures: dict[str, Figure], **values: Any) -> None:
        """Print the tables, write them, the pictures and results.json, and say where they are."""
        if not distributed.is_first():
            return
        result = {
            "study": self.name,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "options": vars(self.options),
            "machine": machine(),
            "seconds": time.perf_counter() - self.started,
            **values,
            "runs": self.runs,
        }
        for name, figure in pictures.items():
            figure.savefig(self.folder / name, dpi=PICTURE_DPI)
        files.save_json(self.folder / "results.json", result)
        text = "\n".join(f"{table.text('github')}\n" for table in tables.values())
        files.save_text(self.folder / "results.md", text)
        for table in tables.values():
            print(f"\n{table.text()}")
        written = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        print(f"\nwritten to {self.folder}: {', '.join(written)}")


def parser(script: str, description: str, datasets: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every study; each adds its own."""
    result = cli.Parser(prog=script, description=description)
    add = result.add_argument
    add("--data", choices=list(datasets), default="digits", help="default: digits, embedded")
    add("--epochs", type=int, help="of every run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any value of the recipe")
    cli.add_settings(result)
    return result


def command(
    name: str,
    options_parser: argparse.ArgumentParser,
    run: Callable[[Study], None],
    arguments: Sequence[str] | None,
) -> int:
    """Run a study as the command line says; the exit code."""
    try:
        study = Study(name, options_parser.parse_args(arguments))
        run(study)
    except (UsageError, OSError) as error:
        if distributed.is_first():  # all processes refuse the same
            options_parser.error(str(error))
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished runs are in {study.folder / 'runs'}", file=sys.stderr)
        return 130
    finally:
        distributed.close()
    return 0
