"""Classes of torch and torchvision, built from a recipe's tables."""

from typing import Any

from torch import nn

from .errors import UsageError


def build(namespace: Any, table: dict[str, Any], key: str, *arguments: Any) -> Any:
    """The class named in ``table``, called with ``arguments`` and the rest of the table."""
    name = str(table.get("name"))
    builder = getattr(namespace, name, None)
    if not isinstance(builder, type):
        raise UsageError(f"[{key}] {namespace.__name__} has no class {name!r}")
    try:
        return builder(*arguments, **{k: v for k, v in table.items() if k != "name"})
    except (TypeError, ValueError) as error:
        raise UsageError(f"[{key}] {name}: {error}") from None


def transforms(tables: list[dict[str, Any]], key: str) -> nn.Module | None:
    """Classes of torchvision.transforms.v2, applied in the order of ``tables``; None for none."""
    from torchvision.transforms import v2

    return nn.Sequential(*(build(v2, table, key) for table in tables)) if tables else None
