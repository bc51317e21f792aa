"""Recipes: what is trained and how, as TOML files that the command line can override."""

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


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

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{key} must be a whole number of at least 1, got {value!r}")
        for key in ("data", "network", "optimizer", "loss", "schedule"):
            table = getattr(self, key)
            if not isinstance(table, dict) or (table and not isinstance(table.get("name"), str)):
                raise UsageError(f"recipe {self.name!r}: [{key}] must be a table with a name")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read recipes/<name>.toml, or the TOML file at path ``name``, and apply ``overrides``.

    Overrides map dotted keys to values: ``{"optimizer.lr": 0.01}``.
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
    for key, value in (overrides or {}).items():
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


def _assign(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise UsageError(f"cannot set {key}: {parent} is not a table")
    if last == "name" and tables.get("name") != value:
        tables.clear()  # the arguments belong to the builder that this replaces
    tables[last] = value


def _check(name: str, tables: dict[str, Any]) -> Recipe:
    known = {f.name for f in fields(Recipe)} - {"name"}
    if unknown := sorted(tables.keys() - known):
        known_keys = ", ".join(sorted(known))
        raise UsageError(f"recipe {name!r} has unknown {', '.join(unknown)}; known: {known_keys}")
    if missing := sorted(known - {"schedule"} - tables.keys()):
        raise UsageError(f"recipe {name!r} lacks {', '.join(missing)}")
    return Recipe(name=name, **tables)
