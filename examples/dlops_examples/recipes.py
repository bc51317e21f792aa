"""Recipes: what is trained and how, as TOML files that the command line can override."""

import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
OVERFIT = ("images", "epochs", "batch_size")
OPTIONAL = {"schedule", "augment", "normalize", "overfit"}


@dataclass(frozen=True)
class Recipe:
    """One experiment. A table names a builder (``name``) and holds its arguments."""

    name: str
    epochs: int
    batch_size: int
    data: dict[str, Any]
    network: dict[str, Any]
    optimizer: dict[str, Any]
    loss: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)  # empty: a constant learning rate
    augment: list[dict[str, Any]] = field(default_factory=list)  # of each training image
    normalize: list[dict[str, Any]] = field(default_factory=list)  # of every image
    overfit: dict[str, int] = field(default_factory=dict)  # images, epochs, batch_size

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{key} must be a whole number of at least 1, got {value!r}")
        for key in ("data", "network", "optimizer", "loss", "schedule"):
            table = getattr(self, key)
            if not isinstance(table, dict) or (table and not isinstance(table.get("name"), str)):
                raise UsageError(f"recipe {self.name!r}: [{key}] must be a table with a name")
        for key in ("augment", "normalize"):
            steps = getattr(self, key)
            if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
                raise UsageError(f"recipe {self.name!r}: {key} must be a list of tables, [[{key}]]")
        if self.overfit and set(self.overfit) != set(OVERFIT):
            raise UsageError(f"recipe {self.name!r}: [overfit] takes {', '.join(OVERFIT)}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read recipes/<name>.toml, or the TOML file at path ``name``, and apply ``overrides``.

    Overrides map dotted keys to values: ``{"optimizer.lr": 0.01}``. Where these name other
    data than the digits, the recipe's table [real] is applied before them.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise UsageError(
            f"no recipe {name!r}: give the path of a .toml file, or one of {', '.join(names())}"
        )
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}") from None
    overrides, real = overrides or {}, tables.pop("real", {})
    if not isinstance(real, dict):
        raise UsageError(f"recipe {path.stem!r}: [real] must be a table")
    on_digits = overrides.get("data.name", "digits") == "digits"
    # A name clears its table, so it comes before the arguments given with it.
    given = sorted(overrides.items(), key=lambda item: not item[0].endswith(".name"))
    for key, value in [*([] if on_digits else _flat(real)), *given]:
        _assign(tables, key, value)
    return _check(path.stem, tables)


def parse_override(text: str) -> tuple[str, Any]:
    """``network.dropout=0.5`` as a dotted key and a TOML value; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set takes key=value, such as network.dropout=0.5, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _flat(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys, names first: setting one clears its table."""
    for key in sorted(tables, key=lambda key: key != "name"):
        value = tables[key]
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _assign(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise UsageError(f"cannot set {key}: {parent} is not a table")
    if last == "name" and parents != ["data"] and tables.get("name") != value:
        tables.clear()  # the arguments belong to the builder that this replaces
    tables[last] = value


def _check(name: str, tables: dict[str, Any]) -> Recipe:
    known = {f.name for f in fields(Recipe)} - {"name"}
    if unknown := sorted(tables.keys() - known):
        known_keys = ", ".join(sorted(known))
        raise UsageError(f"recipe {name!r} has unknown {', '.join(unknown)}; known: {known_keys}")
    if missing := sorted(known - OPTIONAL - tables.keys()):
        raise UsageError(f"recipe {name!r} lacks {', '.join(missing)}")
    return Recipe(name=name, **tables)
