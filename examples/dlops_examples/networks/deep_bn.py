"""Eleven convolutions with batch norm, halving the image as they widen."""

from torch import nn

from .common import conv_bn

# Output channels and stride of each 3x3 convolution.
PAIRS = (
    ((64, 1), (64, 1)),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1)),
    ((1024, 2), (1024, 1)),
)


def deep_bn(channels: int, size: int, classes: int) -> nn.Sequential:
    """7x7 convolution, max-pool 3/2, five pairs of 3x3 conv/BN/LeakyReLU, average pool, linear."""
    inputs = 32
    layers: list[nn.Module] = [
        nn.Conv2d(channels, inputs, 7, padding=3),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, 2),
    ]
    for pair in PAIRS:
        for width, stride in pair:
            layers += [*conv_bn(inputs, width, stride=stride), nn.LeakyReLU()]
            inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)
