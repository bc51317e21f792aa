"""Max pooling: a choice of cells, then linear maps.

Given which cell of its window each output chose, pooling is linear in its input. Scatter (the
backward) and gather are each other's transpose, and so differentiate into each other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import call, differentiable, memory_format, register

ops = torch.ops.dlops

MAX_BYTE_CELLS = 256


def output_size(
    input_size: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[int]:
    """Height and width of the pooled output, as torch.nn.MaxPool2d gives them."""
    result = []
    for size, kernel, step, pad, spread in zip(
        input_size, kernel_size, stride, padding, dilation, strict=True
    ):
        reach = size + 2 * pad - spread * (kernel - 1) - 1
        count = (reach + (step - 1 if ceil_mode else 0)) // step + 1
        # The last window must start inside the image or its left padding.
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1
        result.append(count)
    return result


class MaxPool2d(Function):
    """max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode) -> (output, cells)"""

    @staticmethod
    def forward(input: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
        return ops.max_pool2d(input, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, *window, _ = inputs
        _, cells = output
        ctx.mark_non_differentiable(cells)
        ctx.save_for_backward(cells)
        ctx.save_for_forward(cells)
        ctx.input_size = list(input.shape)
        ctx.window = window

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (cells,) = ctx.saved_tensors
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


class MaxPool2dScatter(Function):
    """max_pool2d_scatter(grad_output, cells, input_size, kernel_size, stride, padding, dilation)"""

    @staticmethod
    def forward(grad_output: Tensor, cells: Tensor, input_size: Any, *window: Any) -> Tensor:
        return ops.max_pool2d_scatter(grad_output, cells, input_size, *window)

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
        return ops.max_pool2d_gather(input, cells, *window)

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
    if torch.compiler.is_compiling() or differentiable(input):
        return max_pool2d(input, *window)[0]
    return ops.max_pool2d_values(input, *window)


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
    return torch.empty(
        (*input.shape[:2], *size),
        dtype=dtype,
        device=input.device,
        memory_format=memory_format(input),
    )


@torch.library.register_fake("dlops::max_pool2d")
def _(input: Tensor, kernel_size: Any, *window: Any) -> tuple[Tensor, Tensor]:
    size = output_size(input.shape[2:], kernel_size, *window)
    byte = kernel_size[0] * kernel_size[1] <= MAX_BYTE_CELLS
    return (
        empty_output(input, size, input.dtype),
        empty_output(input, size, torch.uint8 if byte else torch.int64),
    )


@torch.library.register_fake("dlops::max_pool2d_values")
def _(input: Tensor, kernel_size: Any, *window: Any) -> Tensor:
    return empty_output(input, output_size(input.shape[2:], kernel_size, *window), input.dtype)


@torch.library.register_fake("dlops::max_pool2d_indices")
def _(cells: Tensor, input_size: Any, *window: Any) -> Tensor:
    return empty_output(cells, cells.shape[2:], torch.int64)


@torch.library.register_fake("dlops::max_pool2d_scatter")
def _(grad_output: Tensor, cells: Tensor, input_size: Any, *window: Any) -> Tensor:
    return torch.empty(
        tuple(input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format(cells),
    )


@torch.library.register_fake("dlops::max_pool2d_gather")
def _(input: Tensor, cells: Tensor, *window: Any) -> Tensor:
    return empty_output(cells, cells.shape[2:], input.dtype)


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
