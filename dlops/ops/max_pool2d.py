"""Max pooling: a choice of cells, then linear maps.

Given which cell of its window each output chose, pooling is linear in its input. Scatter (the
backward) and gather are each other's transpose, and so differentiate into each other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import (
    call,
    differentiable,
    empty_images,
    kernels,
    register,
    traced,
    transformed,
)
from dlops.ops.shapes import FLOATING, INTEGERS, check, check_dtype, check_shape, pool2d_size

ops = torch.ops.dlops

MAX_BYTE_CELLS = 256


class MaxPool2d(Function):
    """max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode) -> (output, cells)"""

    @staticmethod
    def forward(input: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
        return kernels.max_pool2d(input, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, *window, _ = inputs
        _, cells = output
        ctx.mark_non_differentiable(cells)
        # Else backward would get zeros in the size of cells, allocated and filled for nothing.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cells)
        ctx.save_for_forward(cells)
        ctx.input_size = list(input.shape)
        ctx.window = window

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (cells,) = ctx.saved_tensors
        grad_input = None
        if grad_output is not None:
            grad_input = scatter(grad_output, cells, ctx.input_size, *ctx.window)
        return grad_input, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        return gather(input_t, cells, *ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *window: Any) -> Any:
        output, cells = call(
            MaxPool2d, ops.max_pool2d.default, input.movedim(in_dims[0], 0).flatten(0, 1), *window
        )
        shape = (info.batch_size, -1)
        return (output.unflatten(0, shape), cells.unflatten(0, shape)), (0, 0)


class MaxPool2dValues(Function):
    """The output alone, from (input, window); the cells wait for backward and are not returned.
    Where no transform is active: it has neither jvp nor vmap."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: tuple[Any, ...]) -> Tensor:
        output, cells = kernels.max_pool2d(input, *window)
        ctx.save_for_backward(cells)
        ctx.input_size = input.shape
        ctx.window = window[:-1]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        return scatter(grad_output, cells, ctx.input_size, *ctx.window), None


class MaxPool2dScatter(Function):
    """max_pool2d_scatter(grad_output, cells, input_size, kernel_size, stride, padding, dilation)"""

    @staticmethod
    def forward(grad_output: Tensor, cells: Tensor, input_size: Any, *window: Any) -> Tensor:
        return kernels.max_pool2d_scatter(grad_output, cells, input_size, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cells, ctx.input_size, *ctx.window = inputs
        ctx.save_for_backward(cells)
        ctx.save_for_forward(cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cells,) = ctx.saved_tensors
        return gather(grad, cells, *ctx.window), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor, *_: Any) -> Tensor:
        (cells,) = ctx.saved_tensors
        return scatter(grad_t, cells, ctx.input_size, *ctx.window)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad_output: Tensor,
        cells: Tensor,
        input_size: Any,
        *window: Any,
    ) -> tuple[Tensor, int]:
        grad_output, cells = fold_both(info, in_dims, grad_output, cells)
        n, *rest = input_size
        result = scatter(grad_output, cells, [info.batch_size * n, *rest], *window)
        return result.unflatten(0, (info.batch_size, n)), 0


class MaxPool2dGather(Function):
    """max_pool2d_gather(input, cells, kernel_size, stride, padding, dilation)"""

    @staticmethod
    def forward(input: Tensor, cells: Tensor, *window: Any) -> Tensor:
        return kernels.max_pool2d_gather(input, cells, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, cells, *ctx.window = inputs
        ctx.input_size = list(input.shape)
        ctx.save_for_backward(cells)
        ctx.save_for_forward(cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cells,) = ctx.saved_tensors
        return scatter(grad, cells, ctx.input_size, *ctx.window), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Tensor:
        (cells,) = ctx.saved_tensors
        return gather(input_t, cells, *ctx.window)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, cells: Tensor, *window: Any
    ) -> tuple[Tensor, int]:
        input, cells = fold_both(info, in_dims, input, cells)
        return gather(input, cells, *window).unflatten(0, (info.batch_size, -1)), 0


def max_pool2d(input: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    return call(MaxPool2d, ops.max_pool2d.default, input, *window)


def max_pool2d_values(input: Tensor, *window: Any) -> Tensor:
    """The output alone; the cells are left out where nothing can ask for a derivative."""
    if traced() or transformed():
        return max_pool2d(input, *window)[0]
    if differentiable(input):
        return MaxPool2dValues.apply(input, window)
    return kernels.max_pool2d_values(input, *window)


def scatter(grad_output: Tensor, cells: Tensor, input_size: Any, *window: Any) -> Tensor:
    args = (grad_output, cells, list(input_size), *window)
    return call(MaxPool2dScatter, ops.max_pool2d_scatter.default, *args)


def gather(input: Tensor, cells: Tensor, *window: Any) -> Tensor:
    return call(MaxPool2dGather, ops.max_pool2d_gather.default, input, cells, *window)


def fold_both(
    info: Any, in_dims: tuple[Any, ...], values: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves the batch dimension of both into their first one."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1)
        return tensor.movedim(dim, 0).flatten(0, 1)

    return fold(values, in_dims[0]), fold(cells, in_dims[1])


# ----------------------------------------------------- the op without cells, where it is called raw


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.window = inputs
    ctx.save_for_backward(input)


def _choose_again(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    *window, _ = ctx.window
    _, cells = max_pool2d(input.detach(), *ctx.window)
    return scatter(grad_output, cells, input.shape, *window), None, None, None, None, None


torch.library.register_autograd(
    "dlops::max_pool2d_values", _choose_again, setup_context=_save_input
)


# ------------------------------------------------------------------------------------ fake kernels


def empty_output(input: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    return empty_images(input, (*input.shape[:2], *size), input, dtype=dtype)


@torch.library.register_fake("dlops::max_pool2d")
def _(input: Tensor, kernel_size: Any, *window: Any) -> tuple[Tensor, Tensor]:
    size = pool2d_size("max_pool2d", input.shape, kernel_size, *window)
    check_dtype("max_pool2d", input, "input", (*FLOATING, *INTEGERS))
    byte = kernel_size[0] * kernel_size[1] <= MAX_BYTE_CELLS
    return (
        empty_output(input, size, input.dtype),
        empty_output(input, size, torch.uint8 if byte else torch.int64),
    )


@torch.library.register_fake("dlops::max_pool2d_values")
def _(input: Tensor, kernel_size: Any, *window: Any) -> Tensor:
    size = pool2d_size("max_pool2d", input.shape, kernel_size, *window)
    check_dtype("max_pool2d", input, "input", (*FLOATING, *INTEGERS))
    return empty_output(input, size, input.dtype)


@torch.library.register_fake("dlops::max_pool2d_indices")
def _(cells: Tensor, input_size: Any, *window: Any) -> Tensor:
    check_cells("max_pool2d_indices", cells, input_size, window)
    return empty_output(cells, cells.shape[2:], torch.int64)


@torch.library.register_fake("dlops::max_pool2d_scatter")
def _(grad_output: Tensor, cells: Tensor, input_size: Any, *window: Any) -> Tensor:
    check_cells("max_pool2d_scatter", cells, input_size, window)
    check_shape("max_pool2d_scatter", grad_output, "grad_output", cells.shape)
    return empty_images(grad_output, input_size, cells)


@torch.library.register_fake("dlops::max_pool2d_gather")
def _(input: Tensor, cells: Tensor, *window: Any) -> Tensor:
    check_cells("max_pool2d_gather", cells, input.shape, window)
    return empty_output(cells, cells.shape[2:], input.dtype)


def check_cells(op: str, cells: Tensor, input_size: Any, window: Any) -> None:
    """The cells of a pooling of images of this size, with or without ceil_mode."""
    kernel_size, stride, padding, dilation = window
    size = pool2d_size(op, input_size, kernel_size, stride, padding, dilation, True)
    check(
        op,
        cells.dim() == 4 and cells.shape[0] == input_size[0] and cells.shape[1] == input_size[1],
        f"expected cells of {input_size[0]} images and {input_size[1]} channels, "
        f"got shape {tuple(cells.shape)}",
    )
    check(
        op,
        1 <= cells.shape[2] <= size[0] and 1 <= cells.shape[3] <= size[1],
        f"expected cells of at most {tuple(size)} pixels, got shape {tuple(cells.shape)}",
    )


register(MaxPool2d, "max_pool2d")
register(MaxPool2dScatter, "max_pool2d_scatter")
register(MaxPool2dGather, "max_pool2d_gather")


@torch.library.register_vmap("dlops::max_pool2d_indices")
def _(
    info: Any, in_dims: tuple[Any, ...], cells: Tensor, input_size: Any, *window: Any
) -> tuple[Tensor, int]:
    n, *rest = input_size
    folded = cells.movedim(in_dims[0], 0).flatten(0, 1)
    indices = ops.max_pool2d_indices(folded, [info.batch_size * n, *rest], *window)
    return indices.unflatten(0, (info.batch_size, n)), 0
