"""The smallest convolutional classifier."""

from torch import nn

from .common import flat_size


def one_conv(
    channels: int, size: int, classes: int, width: int = 32, kernel: int = 5, padding: int = 2
) -> nn.Sequential:
    """One convolution, ReLU, max-pool 2/2 and a linear layer: `scratch` and `vanilla`."""
    features = nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return nn.Sequential(*features, nn.Linear(flat_size(features, channels, size), classes))
