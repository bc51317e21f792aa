"""Files of a run, each written whole or not at all: a killed run leaves the previous one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import UsageError


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the content
    os.replace(partial, path)


def save_text(path: Path, text: str) -> None:
    _replace(path, lambda file: file.write(text.encode()))


def save_json(path: Path, value: Any) -> None:
    save_text(path, json.dumps(value, indent=1, default=str) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    _replace(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint of this trainer; weights_only, so that a crafted file runs no code."""
    if not path.is_file():
        raise UsageError(f"no checkpoint {path} to resume from: train once without --resume")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["identity"]
    except Exception as error:  # torch.load raises a dozen types for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} is no checkpoint of this trainer ({reason}): delete it") from None
    return state
