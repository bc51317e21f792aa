"""unfold (im2col) and fold (col2im): linear, and each other's transpose."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import call, kernels, register
from dlops.ops.shapes import FLOATING, check_dtype, fold_channels, unfold_size

ops = torch.ops.dlops

DTYPES = (*FLOATING, torch.complex128, torch.complex64, torch.bool)


class Unfold(Function):
    """unfold(input, kernel_size, dilation, padding, stride)"""

    @staticmethod
    def forward(input: Tensor, *window: Any) -> Tensor:
        return kernels.unfold(input, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.window = inputs
        ctx.image_size = list(input.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return fold(grad_output, ctx.image_size, *ctx.window), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Tensor:
        return unfold(input_t, *ctx.window)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, *window: Any
    ) -> tuple[Tensor, int]:
        folded = input.movedim(in_dims[0], 0).flatten(0, 1)
        return unfold(folded, *window).unflatten(0, (info.batch_size, -1)), 0


class Fold(Function):
    """fold(input, output_size, kernel_size, dilation, padding, stride)"""

    @staticmethod
    def forward(input: Tensor, *window: Any) -> Tensor:
        return kernels.fold(input, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.window = inputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _, *window = ctx.window
        return unfold(grad_output, *window), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Tensor:
        return fold(input_t, *ctx.window)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, *window: Any
    ) -> tuple[Tensor, int]:
        folded = input.movedim(in_dims[0], 0).flatten(0, 1)
        return fold(folded, *window).unflatten(0, (info.batch_size, -1)), 0


def unfold(input: Tensor, *window: Any) -> Tensor:
    return call(Unfold, ops.unfold.default, input, *window)


def fold(input: Tensor, *window: Any) -> Tensor:
    return call(Fold, ops.fold.default, input, *window)


@torch.library.register_fake("dlops::unfold")
def _(input: Tensor, kernel_size: Any, *window: Any) -> Tensor:
    rows, cols = unfold_size("unfold", input.shape, kernel_size, *window)
    check_dtype("unfold", input, "input", DTYPES)
    n, channels = input.shape[:2]
    return input.new_empty(n, channels * kernel_size[0] * kernel_size[1], rows * cols)


@torch.library.register_fake("dlops::fold")
def _(input: Tensor, output_size: Any, kernel_size: Any, *window: Any) -> Tensor:
    channels = fold_channels("fold", input.shape, output_size, kernel_size, window)
    check_dtype("fold", input, "input", DTYPES)
    return input.new_empty(input.shape[0], channels, *output_size)


register(Unfold, "unfold")
register(Fold, "fold")
