"""A network small enough for studies of many runs."""

from torch import nn


def compact_cnn(channels: int, size: int, classes: int) -> nn.Sequential:
    """Two conv/BN/ReLU/max-pool blocks, the first with stride 2: small enough for many runs."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (((size + 1) // 2) // 4) ** 2, classes),
    )
