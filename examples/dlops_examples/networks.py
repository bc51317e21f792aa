"""Networks, written in torch.nn alone: impl.place puts them on dlops' kernels."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import UsageError


def mnist_cnn(
    channels: int,
    size: int,
    classes: int,
    widths: tuple[int, int] = (32, 64),
    dropout: float = 0.25,
) -> nn.Sequential:
    """Two blocks of two conv/BN/ReLU, max-pool and dropout, then a two-layer head."""
    layers: list[nn.Module] = []
    inputs = channels
    for width in widths:
        for _ in range(2):
            layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(inputs * (size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, classes),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {"mnist_cnn": mnist_cnn}


def build(name: str, channels: int, size: int, classes: int, **arguments: Any) -> nn.Module:
    if name not in NETWORKS:
        raise UsageError(f"no network {name!r}; known: {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](channels, size, classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"[network] {name}: {error}") from None


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
