"""Two blocks of convolutions with batch norm and dropout, and a two-layer head."""

from torch import nn

from .common import conv_bn


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
            layers += [*conv_bn(inputs, width), nn.ReLU()]
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
