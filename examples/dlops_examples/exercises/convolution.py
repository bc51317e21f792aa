"""Exercises 1, 3, 4 and 5: what convolution and pooling compute, and what they cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

import dlops.functional as F
from dlops import nn

from .check import Check, at_least, at_most, equal

Size = int | Sequence[int]


def convolution_matrix(
    weight: Tensor,
    size: tuple[int, int],
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
) -> Tensor:
    """A with ``conv2d(x, weight).flatten() == A @ x.flatten()``, for an image x of (C, *size).

    Column n is the convolution of the n-th unit image. im2col (unfold) of all unit images at once
    says which pixel each tap of the kernel meets at each position; weighting the taps gives A.

    Args:
        weight: the kernel, (O, C, R, S).
        size: height and width of the image.

    Returns:
        (O * OH * OW, C * H * W).
    """
    pixels = weight.shape[1] * size[0] * size[1]
    units = torch.eye(pixels, dtype=weight.dtype).view(pixels, weight.shape[1], *size)
    taps = F.unfold(units, tuple(weight.shape[2:]), dilation, padding, stride)
    return torch.einsum("ok,nkl->oln", weight.flatten(1), taps).reshape(-1, pixels)


def describe_matrix(matrix: Tensor, width: int = 3) -> list[str]:
    """The rows of the matrix of a 3x3 kernel with the entries 1 to 9, as terms of w and x."""
    return [
        " + ".join(
            f"w{divmod(int(row[pixel]) - 1, 3)[0]}{divmod(int(row[pixel]) - 1, 3)[1]}"
            f"·x{pixel // width}{pixel % width}"
            for pixel in row.nonzero().flatten().tolist()
        )
        for row in matrix
    ]


def as_matrix() -> list[Check]:
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    geometry = {"size": (3, 3), "stride": 4, "padding": 2}
    matrix = convolution_matrix(weight, **geometry)
    flipped = convolution_matrix(weight.flip(2, 3), **geometry)
    checks = [
        equal("shape of A: 3x3 image and kernel, stride 4, padding 2", tuple(matrix.shape), (4, 9)),
        equal("non-zero entries in each row", (matrix != 0).sum(1).tolist(), [1, 1, 1, 1]),
    ]
    outputs = ("y00", "y01", "y10", "y11")
    terms = ("w22·x00", "w20·x02", "w02·x20", "w00·x22")
    for output, term, expected in zip(outputs, describe_matrix(matrix), terms, strict=True):
        checks.append(equal(output, term, expected))
    terms = ("w00·x00", "w02·x02", "w20·x20", "w22·x22")
    for output, term, expected in zip(outputs, describe_matrix(flipped), terms, strict=True):
        checks.append(equal(f"{output} with a flipped kernel", term, expected))
    return [*checks, _any_geometry()]


def _any_geometry() -> Check:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-4, 5, (3, 7, 6), generator=generator).double()
    weight = torch.randint(-4, 5, (4, 3, 3, 2), generator=generator).double()
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 3)}
    matrix = convolution_matrix(weight, (7, 6), **geometry)
    deviation = matrix @ image.flatten() - F.conv2d(image, weight, **geometry).flatten()
    what = "A·vec(x) against conv2d(x), with stride, padding, dilation: difference"
    return equal(what, deviation.abs().max().item(), 0.0)


def accounting() -> list[Check]:
    layer = nn.Conv2d(3, 8, 5)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    output = tuple(layer(torch.zeros(3, 32, 32)).shape)
    positions = F.unfold(torch.zeros(1, 1, 20, 20), 8).shape[-1]
    return [
        equal("parameters of 8 filters of 5x5x3 with bias", parameters, 608),
        equal("their output on a 3x32x32 image", output, (8, 28, 28)),
        equal("positions of an 8x8 patch on a 20x20 image", positions, 13 * 13),
    ]


def corner_blocks() -> Tensor:
    """The four 4x4 images (4, 1, 4, 4) that hold a 3x3 block of ones in one corner each."""
    block = torch.zeros(4, 4)
    block[:3, :3] = 1
    return torch.stack([block, block.flip(1), block.flip(0), block.flip(0, 1)]).unsqueeze(1)


def average_pool2d(images: Tensor, size: int) -> Tensor:
    """Average pooling is the convolution with a constant kernel; for images of one channel."""
    kernel = torch.full((1, 1, size, size), 1 / size**2, dtype=images.dtype)
    return F.conv2d(images, kernel, stride=size)


def pooling() -> list[Check]:
    corners = ("top left", "top right", "bottom left", "bottom right")
    averages = (
        [[1.0, 0.5], [0.5, 0.25]],
        [[0.5, 1.0], [0.25, 0.5]],
        [[0.5, 0.25], [1.0, 0.5]],
        [[0.25, 0.5], [0.5, 1.0]],
    )
    images = corner_blocks()
    checks = []
    for corner, image, average in zip(corners, images, averages, strict=True):
        result = average_pool2d(image, 2)[0].tolist()
        checks.append(equal(f"average, ones at the {corner}", result, average))
    for corner, image in zip(corners, images, strict=True):
        result = F.max_pool2d(image, 2)[0].tolist()
        checks.append(equal(f"maximum, ones at the {corner}", result, [[1.0, 1.0], [1.0, 1.0]]))
    return checks


def distance_from_scaling(inputs: int, outputs: int) -> float:
    """How far a random 1x1 convolution is from the nearest multiple of its input, relatively.

    Channels that only the input or only the output has count as zeros of the other.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(inputs, 5, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 1, 1, generator=generator, dtype=torch.float64)
    result = F.conv2d(image, weight)
    channels = max(inputs, outputs)
    x, y = (torch.cat([t, t.new_zeros(channels - len(t), 5, 5)]).flatten() for t in (image, result))
    return ((y - (x @ y) / (x @ x) * x).norm() / y.norm()).item()


def pointwise() -> list[Check]:
    image = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.full((1, 1, 1, 1), 0.7)
    exact = torch.equal(F.conv2d(image, weight), weight.item() * image)
    checks = [
        equal("1→1 channel, weight 0.7: equals 0.7·x bit for bit", exact, True),
        at_most("1→1: distance from the nearest scaling", distance_from_scaling(1, 1), 1e-12),
    ]
    for i, o in ((1, 2), (2, 1), (2, 2)):
        distance = distance_from_scaling(i, o)
        checks.append(at_least(f"{i}→{o}: distance from the nearest scaling", distance, 0.1))
    return checks
