"""Two blocks of convolutions with batch norm, and one linear layer."""

from torch import nn

from .common import conv_bn


def two_block(
    channels: int,
    size: int,
    classes: int,
    widths: tuple[int, int, int, int] = (32, 64, 128, 256),
    dropout: float = 0.3,
) -> nn.Sequential:
    """Twice 5x5 and 3x3 conv/BN/ReLU, max-pool 2/2 and dropout; then one linear layer."""
    layers: list[nn.Module] = []
    inputs = channels
    for first, second in (widths[:2], widths[2:]):
        layers += [*conv_bn(inputs, first, 5), nn.ReLU(), *conv_bn(first, second), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        inputs = second
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * (size // 4) ** 2, classes))
