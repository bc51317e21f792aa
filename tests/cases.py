"""Named shapes, layouts and fills that the tests of every op share.

A case builds its tensors in float64 on the CPU; a test casts, moves and lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from checks import Fill, generator, normal
from torch import Tensor

Size = int | tuple[int, int]


# ---------------------------------------------------------------------------------------------
# Layouts: the same values at other strides.


def poison(x: Tensor) -> float:
    """What to put where nothing may read."""
    return float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max


def sliced(x: Tensor) -> Tensor:
    """A view with an offset and steps in every dimension."""
    room = x.new_full([2 * size + 3 for size in x.shape], poison(x))
    view = room[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    view.copy_(x)
    return view


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions lie the other way round in memory."""
    return x.mT.contiguous().mT


def channels_last(x: Tensor) -> Tensor:
    if x.dim() == 3:
        return x[None].contiguous(memory_format=torch.channels_last)[0]
    return x.contiguous(memory_format=torch.channels_last)


def expanded(x: Tensor) -> Tensor:
    """Every sample is the first one, in the same memory."""
    return x[:1].expand_as(x)


def channels_last_slice(x: Tensor) -> Tensor:
    """The first channels of a channels_last tensor that has more."""
    room = torch.cat([x, torch.full_like(x, poison(x))], dim=-3)
    return channels_last(room)[..., : x.shape[-3], :, :]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "sliced": sliced,
    "transposed": transposed,
    "channels_last": channels_last,
    "channels_last_slice": channels_last_slice,
    "expanded": expanded,
}


# ---------------------------------------------------------------------------------------------
# Convolution


class Conv2dCase(NamedTuple):
    id: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    bias: bool = True

    def tensors(self, fill: Fill = normal) -> list[Any]:
        """Input, weight and bias or None."""
        bias = fill(self.weight[:1], 3) if self.bias else None
        return [fill(self.input, 1), fill(self.weight, 2), bias]

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}


# Small enough to differentiate numerically.
SMALL_CONV2D = [
    Conv2dCase("3x3", (2, 3, 7, 7), (4, 3, 3, 3), padding=1),
    Conv2dCase("no_bias", (2, 3, 6, 5), (4, 3, 3, 3), bias=False),
    Conv2dCase("1x1", (2, 5, 4, 3), (3, 5, 1, 1)),
    Conv2dCase("1x1_stride", (2, 4, 5, 7), (3, 4, 1, 1), stride=2),
    Conv2dCase("tails", (1, 3, 11, 19), (5, 3, 3, 3)),
    Conv2dCase("kernel_over_tile", (1, 1, 18, 17), (2, 1, 17, 17), padding=1),
    Conv2dCase("kernel_is_image", (2, 3, 4, 5), (4, 3, 4, 5)),
    Conv2dCase("dilated", (2, 2, 11, 10), (3, 2, 3, 3), padding=2, dilation=(2, 3)),
    Conv2dCase("grouped", (2, 6, 5, 6), (4, 3, 3, 2), groups=2),
    Conv2dCase("depthwise", (2, 5, 6, 5), (5, 1, 3, 3), padding=1, groups=5),
    Conv2dCase("depthwise_multiplier", (1, 3, 6, 5), (6, 1, 3, 2), groups=3),
    Conv2dCase(
        "asymmetric", (2, 2, 9, 8), (3, 2, 2, 4), stride=(2, 3), padding=(1, 2), dilation=(3, 1)
    ),
    Conv2dCase("same_odd", (2, 2, 5, 6), (3, 2, 3, 5), padding="same"),
    Conv2dCase("same_even", (2, 2, 5, 6), (3, 2, 2, 4), padding="same"),
    Conv2dCase("same_dilated", (1, 2, 7, 6), (3, 2, 2, 3), padding="same", dilation=3),
    Conv2dCase("valid", (2, 2, 5, 6), (3, 2, 3, 2), padding="valid"),
    Conv2dCase("stride_over_kernel", (2, 2, 8, 9), (3, 2, 2, 2), stride=3),
    Conv2dCase("padding_over_kernel", (1, 2, 3, 4), (3, 2, 2, 2), padding=4),
    Conv2dCase("2x2_image", (3, 4, 2, 2), (5, 4, 3, 3), padding=1),
    Conv2dCase("1x1_image", (3, 4, 1, 1), (5, 4, 3, 3), padding=1),
    Conv2dCase("one_channel", (2, 1, 8, 8), (3, 1, 5, 5)),
    Conv2dCase("empty_batch", (0, 3, 5, 5), (4, 3, 3, 3)),
    Conv2dCase("batch_1", (1, 2, 5, 5), (3, 2, 3, 3)),
    Conv2dCase("batch_33", (33, 2, 3, 3), (2, 2, 2, 2)),
    Conv2dCase("unbatched", (3, 6, 5), (4, 3, 3, 3), stride=(1, 2), padding=1),
    # More than a few channels, which are not unfolded.
    Conv2dCase("thick", (2, 9, 7, 6), (10, 9, 3, 3), padding=1),
    Conv2dCase("thick_strided", (2, 10, 9, 8), (9, 10, 3, 3), stride=2, padding=1),
    Conv2dCase("thick_dilated", (2, 9, 9, 7), (9, 9, 3, 2), padding=2, dilation=2),
    Conv2dCase("thick_grouped", (2, 18, 6, 5), (20, 9, 3, 2), groups=2, padding=1),
    Conv2dCase(
        "thick_asymmetric",
        (2, 9, 9, 8),
        (9, 9, 2, 4),
        stride=(2, 3),
        padding=(1, 2),
        dilation=(3, 1),
    ),
    Conv2dCase("many_small_images", (18, 9, 4, 3), (9, 9, 3, 3), padding=1),
    Conv2dCase("meets_no_column", (1, 9, 2, 1), (2, 9, 1, 1), stride=2, padding=1),
    Conv2dCase("meets_only_padding", (1, 9, 3, 3), (2, 9, 1, 1), stride=(20, 30), padding=(1, 2)),
]

# Larger than a block of any dimension: C R S > 1024, many output channels, many pixels.
LARGE_CONV2D = [
    Conv2dCase("deep", (2, 128, 6, 5), (17, 128, 3, 3)),
    Conv2dCase("deep_1x1", (1, 1030, 3, 3), (3, 1030, 1, 1)),
    Conv2dCase("deep_2x2_image", (5, 256, 2, 2), (64, 256, 3, 3), padding=1),
    Conv2dCase("many_outputs", (1, 16, 9, 9), (130, 16, 3, 3)),
    Conv2dCase("strips", (2, 64, 40, 24), (40, 64, 3, 3), padding=1),
    Conv2dCase("few_pixels", (1, 43, 5, 5), (70, 43, 3, 3), padding=1),
    Conv2dCase("few_pixels_deep", (2, 256, 4, 5), (250, 256, 3, 3), padding=1),
    Conv2dCase("few_pixels_dilated", (1, 512, 7, 6), (256, 512, 2, 3), padding=(1, 2), dilation=2),
    Conv2dCase("few_pixels_many_outputs", (2, 70, 5, 4), (512, 70, 3, 3), stride=(2, 1), padding=1),
    Conv2dCase("few_pixels_without_borders", (1, 128, 6, 5), (256, 128, 3, 3)),
    Conv2dCase("few_pixels_of_images", (3, 86, 7, 6), (130, 43, 3, 2), stride=(2, 1), groups=2),
    Conv2dCase("many_images", (33, 32, 6, 6), (70, 32, 3, 3), padding=1),
    Conv2dCase("heavy_strided", (20, 128, 4, 5), (130, 128, 3, 3), stride=2, padding=1),
    Conv2dCase("first_layer_small_images", (20, 3, 9, 8), (40, 3, 5, 5), stride=(2, 1), padding=2),
    Conv2dCase("first_layer", (2, 3, 32, 31), (64, 3, 3, 3), padding=1),
    Conv2dCase("few_channels", (2, 8, 30, 13), (21, 8, 7, 7), padding=(3, 4)),
    Conv2dCase(
        "few_channels_strided",
        (2, 5, 61, 94),
        (70, 5, 3, 4),
        stride=(2, 1),
        padding=(0, 5),
        dilation=(2, 3),
    ),
    Conv2dCase("few_channels_strips", (1, 3, 70, 219), (70, 3, 7, 7), stride=2, padding=3),
    Conv2dCase("few_channels_dilated", (2, 6, 17, 12), (20, 3, 3, 2), (4, 3), 2, (3, 1), groups=2),
    Conv2dCase("few_channels_grouped", (2, 16, 9, 14), (18, 8, 1, 3), padding=(2, 1), groups=2),
    Conv2dCase("7x7_stride", (1, 3, 40, 43), (40, 3, 7, 7), stride=2, padding=3),
    Conv2dCase("grouped_deep", (3, 64, 7, 7), (96, 16, 3, 3), padding=1, groups=4),
    Conv2dCase("depthwise_wide", (2, 33, 19, 35), (33, 1, 3, 3), padding=1, groups=33),
    Conv2dCase(
        "depthwise_strided",
        (2, 37, 18, 23),
        (37, 1, 5, 3),
        stride=(2, 3),
        padding=(2, 3),
        dilation=(1, 2),
        groups=37,
    ),
    Conv2dCase(
        "depthwise_stride_over_kernel", (1, 20, 17, 19), (20, 1, 2, 2), stride=(5, 3), groups=20
    ),
    Conv2dCase("depthwise_row_blocks", (1, 2, 30, 70), (2, 1, 3, 3), padding=1, groups=2),
    Conv2dCase("thin_groups", (2, 12, 17, 40), (36, 3, 3, 3), stride=2, padding=1, groups=4),
    Conv2dCase("batch_33_images", (33, 8, 7, 7), (16, 8, 3, 3), padding=1),
    Conv2dCase("dilated_wide", (1, 9, 40, 37), (18, 9, 3, 3), padding=4, dilation=4),
]

CONV2D = SMALL_CONV2D + LARGE_CONV2D


# ---------------------------------------------------------------------------------------------
# unfold and fold


class UnfoldCase(NamedTuple):
    id: str
    input: tuple[int, ...]
    kernel_size: Size
    dilation: Size = 1
    padding: Size = 0
    stride: Size = 1

    def image(self, fill: Fill = normal) -> Tensor:
        return fill(self.input, 1)

    def columns(self, fill: Fill = normal) -> Tensor:
        """A tensor of the size that unfold gives."""
        size = torch.nn.functional.unfold(torch.empty(self.input), **self.arguments()).shape
        return fill(size, 2)

    def arguments(self) -> dict[str, Any]:
        names = ("kernel_size", "dilation", "padding", "stride")
        return {name: getattr(self, name) for name in names}


UNFOLD = [
    UnfoldCase("3x3", (2, 3, 6, 5), 3),
    UnfoldCase("1x1", (2, 3, 4, 5), 1),
    UnfoldCase("tails", (1, 2, 17, 19), 3, padding=1, stride=2),
    UnfoldCase("asymmetric", (2, 2, 9, 8), (2, 3), dilation=(2, 1), padding=(1, 2), stride=(3, 2)),
    UnfoldCase("dilated", (1, 2, 9, 10), 3, dilation=(2, 3), padding=2),
    UnfoldCase("kernel_over_tile", (1, 1, 18, 17), 17),
    UnfoldCase("kernel_is_image", (2, 2, 4, 3), (4, 3)),
    UnfoldCase("stride_over_kernel", (2, 2, 8, 9), 2, stride=3),
    UnfoldCase("padding_over_kernel", (1, 2, 3, 2), 2, padding=3),
    UnfoldCase("1x1_image", (3, 2, 1, 1), 3, padding=1),
    UnfoldCase("empty_batch", (0, 3, 5, 5), 3),
    UnfoldCase("batch_33", (33, 1, 3, 4), 2),
    UnfoldCase("unbatched", (3, 6, 5), (3, 2), padding=1),
]


# ---------------------------------------------------------------------------------------------
# Max pooling


def distinct(size: Sequence[int], seed: int = 0) -> Tensor:
    """No two values are equal, nor near enough for a numerical derivative to swap them."""
    count = torch.Size(size).numel()
    order = torch.randperm(count, generator=generator(seed)).to(torch.float64)
    return (order / max(count, 1) * 4 - 2).reshape(tuple(size))


class MaxPool2dCase(NamedTuple):
    id: str
    input: tuple[int, ...]
    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    dilation: Size = 1
    ceil_mode: bool = False

    def tensor(self, fill: Fill = distinct) -> Tensor:
        return fill(self.input, 1)

    def arguments(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}


MAX_POOL2D = [
    MaxPool2dCase("2x2", (2, 3, 6, 8), 2),
    MaxPool2dCase("2x2_tails", (1, 3, 17, 19), 2),
    MaxPool2dCase("3x3_stride_2", (2, 2, 9, 11), 3, 2),
    MaxPool2dCase("3x3_stride_2_padded", (2, 2, 8, 9), 3, 2, 1),
    MaxPool2dCase("3x3_stride_1_padded", (2, 2, 7, 6), 3, 1, 1),
    MaxPool2dCase("1x1", (2, 2, 4, 5), 1),
    MaxPool2dCase("1x1_stride", (2, 2, 5, 7), 1, 3),
    MaxPool2dCase("overlapping", (1, 2, 12, 11), 5, (2, 1)),
    MaxPool2dCase("dilated", (2, 2, 9, 10), 3, 1, 1, (2, 3)),
    MaxPool2dCase("dilated_stride", (1, 2, 12, 11), 2, 2, 0, 3),
    MaxPool2dCase("ceil", (2, 2, 7, 8), 3, 2, ceil_mode=True),
    MaxPool2dCase("ceil_padded", (2, 2, 6, 7), (3, 2), 2, 1, ceil_mode=True),
    MaxPool2dCase("ceil_dilated", (1, 2, 8, 9), 2, 3, 1, 2, ceil_mode=True),
    MaxPool2dCase("ceil_window_over_image", (1, 2, 3, 3), 5, 4, 1, ceil_mode=True),
    MaxPool2dCase("asymmetric", (2, 2, 9, 8), (2, 4), (3, 1), (1, 2), (2, 1)),
    MaxPool2dCase("cells_256", (1, 2, 17, 18), 16, 1),
    MaxPool2dCase("cells_over_256", (1, 2, 18, 19), 17, 1),
    MaxPool2dCase("kernel_is_image", (2, 3, 5, 4), (5, 4)),
    MaxPool2dCase("stride_over_kernel", (2, 2, 8, 9), 2, 3),
    MaxPool2dCase("padding_out_of_reach", (1, 2, 13, 11), 7, 2, (0, 1), 2),
    MaxPool2dCase("2x2_image", (3, 4, 2, 2), 2),
    MaxPool2dCase("1x1_image", (3, 4, 1, 1), 3, 2, 1),
    MaxPool2dCase("empty_batch", (0, 3, 6, 6), 2),
    MaxPool2dCase("batch_33", (33, 1, 3, 4), 2, 1),
    MaxPool2dCase("unbatched", (3, 6, 7), 3, 2, 1),
]

# Wider than the vectors, in pixels and in channels.
LARGE_MAX_POOL2D = [
    MaxPool2dCase("2x2_wide", (2, 5, 34, 67), 2),
    MaxPool2dCase("3x3_stride_2_wide", (1, 37, 33, 41), 3, 2, 1),
    MaxPool2dCase("3x3_stride_1_wide", (3, 16, 15, 70), 3, 1, 1),
    MaxPool2dCase("many_channels", (2, 133, 7, 6), 3, 2, 1),
]


# ---------------------------------------------------------------------------------------------
# Focal losses


class FocalCase(NamedTuple):
    """Logits (C), (N, C) or (N, C, d1, ...)."""

    id: str
    input: tuple[int, ...]

    @property
    def classes(self) -> int:
        return self.input[0] if len(self.input) == 1 else self.input[1]

    @property
    def rows(self) -> tuple[int, ...]:
        """The size of an index target."""
        return () if len(self.input) == 1 else self.input[:1] + self.input[2:]

    def logits(self) -> Tensor:
        return 2 * normal(self.input, 1)

    def indices(self, ignored: bool = False) -> Tensor:
        """Class indices; with `ignored`, -100 in place of about a third."""
        target = torch.randint(self.classes, self.rows, generator=generator(2))
        if ignored:
            target[torch.rand(self.rows, generator=generator(4)) < 0.3] = -100
        return target

    def probabilities(self) -> Tensor:
        return normal(self.input, 2).softmax(0 if len(self.input) == 1 else 1)

    def weight(self) -> Tensor:
        return torch.rand(self.classes, dtype=torch.float64, generator=generator(3)) + 0.5

    def hard_targets(self) -> Tensor:
        """0 and 1, for the sigmoid form."""
        return (torch.rand(self.input, generator=generator(2)) < 0.3).to(torch.float64)

    def soft_targets(self) -> Tensor:
        """Fractions between 0 and 1, for the sigmoid form."""
        return torch.rand(self.input, dtype=torch.float64, generator=generator(2))


SMALL_FOCAL = [
    FocalCase("1_class", (4, 1)),
    FocalCase("2_classes", (5, 2)),
    FocalCase("3_classes", (7, 3)),
    FocalCase("10_classes", (6, 10)),
    FocalCase("17_classes", (3, 17)),
    # From 24 classes on, side by side, vectors run over the classes.
    FocalCase("25_classes", (17, 25)),
    FocalCase("40_classes_image", (2, 40, 3, 2)),
    FocalCase("80_classes", (2, 80)),
    FocalCase("row", (5,)),
    FocalCase("sequence", (2, 4, 3)),
    FocalCase("image", (2, 3, 3, 2)),
    FocalCase("batch_1", (1, 6)),
    FocalCase("batch_33", (33, 3)),
    FocalCase("empty_batch", (0, 4)),
]

LARGE_FOCAL = [
    FocalCase("80_classes_257_rows", (257, 80)),
    FocalCase("1000_classes", (33, 1000)),
    FocalCase("1_class_100_rows", (100, 1)),
    FocalCase("wide_row", (1003,)),
    FocalCase("large_image", (3, 19, 17, 23)),
]

FOCAL = SMALL_FOCAL + LARGE_FOCAL

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]


def ids(case: Any) -> str:
    """For `pytest.mark.parametrize(..., ids=ids)`."""
    return getattr(case, "id", None) or str(case).removeprefix("torch.")
