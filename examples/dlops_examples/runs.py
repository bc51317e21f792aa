"""A run among others: its folder, what it shares with them, and how two histories differ."""

import json
from pathlib import Path
from typing import Any

from . import impl
from .logs import History
from .recipes import Recipe
from .settings import Settings


def folder(recipe: Recipe, settings: Settings, implementation: str | None = None) -> Path:
    return settings.out / f"{recipe.name}-{implementation or settings.impl}"


def identity(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """What two runs share if their curves are to be compared, or one is to continue the other."""
    config = recipe.as_dict()
    del config["epochs"]
    return {"recipe": config, **{k: getattr(settings, k) for k in ("seed", "limit", "amp")}}


def differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> str:
    """What differs between two nested configurations, as ``key: theirs, now mine``."""
    found = []
    for key in sorted(theirs.keys() | mine.keys()):
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return "; ".join(filter(None, found))


def other_history(recipe: Recipe, settings: Settings) -> tuple[str, History, str]:
    """The other implementation's name, its history on the same recipe, and why there is none."""
    other = next(name for name in impl.IMPLS if name != settings.impl)
    path = folder(recipe, settings, other) / "metrics.json"
    if not path.is_file():
        return other, [], f"no {path}"
    try:
        metrics = json.loads(path.read_text())
        differing = differences(metrics["identity"], identity(recipe, settings))
    except (ValueError, KeyError, TypeError):
        return other, [], f"{path} is not of this trainer"
    if differing:
        return other, [], f"{path} was trained otherwise: {differing}"
    return other, metrics["history"], ""


def largest_difference(ours: History, theirs: History) -> str:
    def largest(key: str) -> float:
        return max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=False))

    return (
        f"train loss differs by at most {largest('train_loss'):.2g}, "
        f"test accuracy by at most {largest('test_accuracy'):.2g}"
    )
