"""Running experiments one after the other, and publishing what they gave."""

import importlib
import json
import re
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import cli, files

HEADER = (
    "| recipe | parameters | epochs | test accuracy | best | time | published |\n"
    "|---|---:|---:|---:|---:|---:|---|\n"
)
# README.md's places for tables: <!-- results: scratch vanilla --> ... <!-- end of results -->
PLACE = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


class Runner:
    """Runs commands in this process; ``results`` maps each to what is published of it."""

    def __init__(
        self, out: Path, quick: bool, threads: int | None, timed: bool, machine: str = ""
    ) -> None:
        self.out, self.quick, self.timed = out, quick, timed
        self.threads = ["--threads", str(threads)] if threads else []
        # Now, because the commit may be another one when the last experiment ends.
        self.measured = measured(threads or torch.get_num_threads(), machine)
        self.results: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    def recipe(self, name: str, published: str) -> None:
        """Train a recipe; its row is a line of a table."""
        quick = ["--limit", "48", "--epochs", "1"] if self.quick else []
        arguments = ["--recipe", name, *quick, *self.threads, "--out", str(self.out)]
        seconds = self._run(name, lambda: cli.main(arguments))
        folder = self.out / f"{name}-dlops"
        if seconds is None:
            return
        metrics = json.loads((folder / "metrics.json").read_text())
        cells = (
            f"`{name}`",
            f"{metrics['parameters']:,}",
            str(len(metrics["history"])),
            f"{metrics['test_accuracy']:.4f}",
            f"{metrics['best_test_accuracy']:.4f}",
            self._time(seconds),
            published,
        )
        row = f"| {' | '.join(cells)} |\n"
        self.results[name] = {"row": row, "pictures": {f"{name}.png": f"{name}-dlops/curves.png"}}

    def study(self, name: str, quick: list[str]) -> None:
        """Run the study of that name; its table is what it wrote into results.md."""
        module = importlib.import_module(f"{__package__}.studies.{name}")
        arguments = [*(quick if self.quick else []), *self.threads, "--out", str(self.out)]
        seconds = self._run(name, lambda: module.main(arguments))
        if seconds is None:
            return
        folder = self.out / name
        pictures = {f"{name}-{p.name}": f"{name}/{p.name}" for p in sorted(folder.glob("*.png"))}
        table = (folder / "results.md").read_text().strip()
        text = f"{table}\n\nTime: {self._time(seconds)}.\n"
        self.results[name] = {"table": text, "pictures": pictures}

    def _run(self, name: str, command: Callable[[], int]) -> float | None:
        """The seconds that ``command`` took; None if it failed, which stops no other."""
        print(f"\n==== {name}", flush=True)
        start = time.perf_counter()
        try:
            code = command()
        except KeyboardInterrupt:
            raise
        except (Exception, SystemExit):
            traceback.print_exc()
            code = 1
        if code == 130:
            raise KeyboardInterrupt
        if code:
            self.failed.append(name)
            print(f"{name} failed", flush=True)
            return None
        return time.perf_counter() - start

    def _time(self, seconds: float) -> str:
        return f"{seconds:.0f} s" if self.timed else "not timed yet"

    def save(self) -> None:
        """Add to results.json and results.md in ``out``, and print every table."""
        for result in self.results.values():
            result["measured"] = self.measured
        results = load(self.out) | self.results
        text = tables(results, list(results))
        files.save_json(self.out / "results.json", results)
        files.save_text(self.out / "results.md", text)
        print(f"\n{text}\nalso in {self.out / 'results.md'}")
        if self.failed:
            print(f"failed: {', '.join(self.failed)}")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def measured(threads: int, machine: str) -> str:
    """Where these results come from, in one line."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    where = f"{threads} thread{'s' if threads > 1 else ''}{f' of {machine}' if machine else ''}"
    parts = [where, f"torch {torch.__version__}", f"commit {commit.stdout.strip() or 'unknown'}"]
    return ", ".join([*parts, f"{datetime.now(UTC):%Y-%m-%d}"])


def tables(results: dict[str, dict[str, Any]], names: list[str]) -> str:
    """The table of those of ``names`` that have results, and where they were measured."""
    known = [results[name] for name in names if name in results]
    rows = "".join(result["row"] for result in known if "row" in result)
    parts = [HEADER + rows] if rows else []
    parts += [result["table"] for result in known if "table" in result]
    sources = dict.fromkeys(result["measured"] for result in known)
    parts += [f"Run with {source}.\n" for source in sources]
    return "\n".join(parts)


def publish(out: Path, examples: Path) -> None:
    """Copy the results in ``out`` into results/, over earlier ones, and render README.md."""
    results, folder = load(out), examples / "results"
    for result in results.values():
        for name, source in result["pictures"].items():
            shutil.copyfile(out / source, folder / name)
    everything = load(folder) | results
    files.save_json(folder / "results.json", everything)
    readme = examples / "README.md"
    text = PLACE.sub(
        lambda place: f"{place[1]}{tables(everything, place[2].split())}{place[3]}",
        readme.read_text(),
    )
    files.save_text(readme, text)
