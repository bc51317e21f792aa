"""Files of a run, each written whole or not at all: a killed run leaves the previous one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def save_json(path: Path, value: Any) -> None:
    _replace(
        path, lambda partial: partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
    )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    _replace(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"no checkpoint {path} to resume from: train once without --resume")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["identity"]
    except Exception as error:  # torch.load raises a dozen types for a damaged file
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} is no checkpoint of this trainer ({reason}): delete it") from None
    return state
