"""Fully connected hidden layers."""

from collections.abc import Sequence

from torch import nn


def mlp(
    channels: int, size: int, classes: int, units: Sequence[int] = (100,), dropout: float = 0.0
) -> nn.Sequential:
    """Linear, ReLU and dropout for each hidden layer, then a linear layer of logits.

    The softmax is part of the loss: its logarithm is exact there, at any logit.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = channels * size**2
    for outputs in units:
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
