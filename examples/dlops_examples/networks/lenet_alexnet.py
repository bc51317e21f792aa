"""Four unpadded convolutions and three linear layers, between LeNet and AlexNet."""

from torch import nn

from .common import flat_size


def lenet_alexnet(
    channels: int,
    size: int,
    classes: int,
    widths: tuple[int, int, int, int] = (64, 128, 256, 64),
    hidden: tuple[int, int] = (384, 192),
) -> nn.Sequential:
    """3x3, pool 2/2, 3x3, pool 3/2, 3x3, 1x1, linear layers; 32x32 pixels make 1024 features."""
    a, b, c, d = widths
    features = nn.Sequential(
        nn.Conv2d(channels, a, 3),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(a, b, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3),
        nn.ReLU(),
        nn.Conv2d(c, d, 1),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(
        *features,
        nn.Linear(flat_size(features, channels, size), hidden[0]),
        nn.ReLU(),
        nn.Linear(hidden[0], hidden[1]),
        nn.ReLU(),
        nn.Linear(hidden[1], classes),
    )
