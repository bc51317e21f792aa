"""What several networks are made of."""

import torch
from torch import nn


def flat_size(features: nn.Module, channels: int, size: int) -> int:
    """The number of values that ``features`` makes of one image (channels, size, size)."""
    features.eval()  # batch norm and dropout neither learn nor draw from this image
    with torch.no_grad():
        values = features(torch.zeros(1, channels, size, size)).numel()
    features.train()
    return values


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A padded convolution, whose bias batch norm would cancel, and batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]
