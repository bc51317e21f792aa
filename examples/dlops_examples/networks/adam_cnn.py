"""Stacked 3x3 convolutions, with or without batch norm, and a dense head."""

from collections.abc import Sequence

from torch import nn

from .common import conv_bn


def adam_cnn(
    channels: int,
    size: int,
    classes: int,
    widths: Sequence[int] = (32, 64, 128),
    hidden: int = 256,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Per width two 3x3 convolutions with ReLU and a max-pool 2/2; then two linear layers."""
    layers: list[nn.Module] = []
    inputs = channels
    for width in widths:
        for _ in range(2):
            layers += (
                conv_bn(inputs, width) if batch_norm else [nn.Conv2d(inputs, width, 3, padding=1)]
            )
            layers.append(nn.ReLU())
            inputs = width
        layers.append(nn.MaxPool2d(2))
        size //= 2
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(inputs * size**2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
