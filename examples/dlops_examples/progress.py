"""The progress bar of an epoch."""

import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


def bar(images: int, title: str, shown: bool, leave: bool) -> Any:
    """Images, images/s and what describe() says; without ``leave`` it vanishes when it is full."""
    live = sys.stderr.isatty()
    return tqdm(
        total=images,
        desc=title,
        unit=" images",
        mininterval=0.1 if live else 30,  # a log file gets few lines
        leave=leave,
        disable=not shown or not (live or leave),
    )


def describe(bar: Any, loss: float, accuracy: float, test_accuracy: float | None = None) -> None:
    test = "" if test_accuracy is None else f", test {test_accuracy:.4f}"
    bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.4f}{test}", refresh=False)
