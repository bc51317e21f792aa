"""The worked exercises: each result beside its expected value."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import cli, files
from ..exercises import EXERCISES
from .study import Table


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="exercises.py", description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--out", type=Path, default=Path("runs"), help="parent of the folder for the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all exercises and write their table; the exit code is 1 if a result is wrong."""
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[tuple[str, str, str, str]] = []
    wrong = 0
    for title, exercise in EXERCISES.items():
        lines = [(c.what, c.result, c.expected, "yes" if c.holds else "NO") for c in exercise()]
        print(f"\n{title}\n\n{Table(['', 'result', 'expected', ''], lines).text()}")
        wrong += sum(line[-1] == "NO" for line in lines)
        rows += [(f"**{title}**", "", "", ""), *lines]
    table = Table(["exercise", "result", "expected", "holds"], rows).text("github")
    path = options.out / "exercises" / "results.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_text(path, table + "\n")
    verdict = f"{wrong} results are not as expected" if wrong else "all results are as expected"
    print(f"\n{verdict}; the table is also in {path}")
    return int(wrong > 0)
