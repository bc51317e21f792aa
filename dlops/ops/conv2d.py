"""Convolution: three bilinear ops, closed under differentiation.

With y = conv2d(x, w), grad_input(g, w) and grad_weight(g, x) are the two transposes of the same
bilinear map, so the derivatives of each are made of the other two, to every order, in every mode.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import call, differentiable, eager, empty_images, kernels, register
from dlops.ops.shapes import (
    COMPLEX,
    FLOATING,
    INTEGERS,
    check,
    check_dtype,
    check_like,
    check_shape,
    conv2d_size,
)

ops = torch.ops.dlops

# (stride, padding as (top, left, bottom, right), dilation, groups)
Geometry = tuple[list[int], list[int], list[int], int]


class Conv2d(Function):
    """conv2d(input, weight, bias, stride, padding, dilation, groups)"""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return kernels.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *geometry = inputs
        need_input, need_weight = ctx.needs_input_grad[:2]
        # Each gradient reads only the other factor.
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        ctx.save_for_forward(input, weight)
        ctx.geometry = geometry
        ctx.input_size = input.shape
        ctx.kernel_size = weight.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if need_input:
            grad_input = conv2d_grad_input(grad_output, conj(weight), ctx.input_size, *ctx.geometry)
        if need_weight:
            grad_weight = conv2d_grad_weight(
                grad_output, conj(input), ctx.kernel_size, *ctx.geometry
            )
        if need_bias:
            grad_bias = conv2d_grad_bias(grad_output)
        return grad_input, grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Any, weight_t: Any, bias_t: Any, *_: Any) -> Tensor:
        input, weight = ctx.saved_tensors
        if input_t is None and weight_t is None:
            zero = torch.zeros_like(weight)
            return conv2d(input, zero, bias_t, *ctx.geometry)
        if input_t is None:
            return conv2d(input, weight_t, bias_t, *ctx.geometry)
        result = conv2d(input_t, weight, bias_t, *ctx.geometry)
        return result if weight_t is None else result + conv2d(input, weight_t, None, *ctx.geometry)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        input, weight, bias, *geometry = args
        input, weight = to_front(input, in_dims[0]), to_front(weight, in_dims[1])
        if in_dims[2] is not None:  # a bias for each sample is added afterwards
            samples = to_front(bias, in_dims[2])
            if in_dims[0] is None and in_dims[1] is None:
                plain = conv2d(input, weight, None, *geometry)
            else:
                fronts = (*(None if dim is None else 0 for dim in in_dims[:2]), None)
                plain, _ = Conv2d.vmap(info, fronts, input, weight, None, *geometry)
            return plain + samples[:, None, :, None, None], 0
        *window, groups = geometry
        batch = info.batch_size
        if in_dims[1] is None:
            result = conv2d(input.flatten(0, 1), weight, bias, *geometry)
            return result.unflatten(0, (batch, -1)), 0
        if in_dims[0] is None:
            stacked = join_outputs(weight, groups)
            result = conv2d(input, stacked, None, *window, groups)
            result = split_outputs(result, batch, groups, dim=1)
        else:
            result = conv2d(
                join_channels(input), weight.flatten(0, 1), None, *window, batch * groups
            )
            result = result.unflatten(1, (batch, -1)).movedim(1, 0)
        return (result if bias is None else result + bias[:, None, None]), 0


def backward_at_once(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Conv2d's backward by one op, where its gradients are not to be differentiated again."""
    input, weight = ctx.saved_tensors
    legacy_vmap = torch._C._functorch.is_legacy_batchedtensor(grad_output)
    if differentiable(grad_output, input, weight) or legacy_vmap:
        return Conv2d.backward(ctx, grad_output)
    factors = (factor if factor is None else conj(factor) for factor in (input, weight))
    sizes, mask = (ctx.input_size, ctx.kernel_size), ctx.needs_input_grad[:3]
    gradients = kernels.conv2d_backward(grad_output, *factors, *sizes, *ctx.geometry, mask)
    return *gradients, None, None, None, None


class Conv2dGradInput(Function):
    """conv2d_grad_input(grad_output, weight, input_size, stride, padding, dilation, groups)"""

    @staticmethod
    def forward(grad_output: Tensor, weight: Tensor, input_size: Any, *geometry: Any) -> Tensor:
        return kernels.conv2d_grad_input(grad_output, weight, input_size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, weight, ctx.input_size, *ctx.geometry = inputs
        need_grad, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_output if need_weight else None, weight if need_grad else None)
        ctx.save_for_forward(grad_output, weight)
        ctx.kernel_size = weight.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weight = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad[:2]
        by_grad = by_weight = None
        if need_grad:
            by_grad = conv2d(grad, conj(weight), None, *ctx.geometry)
        if need_weight:
            by_weight = conv2d_grad_weight(conj(grad_output), grad, ctx.kernel_size, *ctx.geometry)
        return by_grad, by_weight, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Tensor:
        grad_output, weight = ctx.saved_tensors
        return add(
            grad_t is not None and conv2d_grad_input(grad_t, weight, ctx.input_size, *ctx.geometry),
            weight_t is not None
            and conv2d_grad_input(grad_output, weight_t, ctx.input_size, *ctx.geometry),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        grad_output, weight, input_size, *window, groups = args
        grad_output = to_front(grad_output, in_dims[0])
        weight = to_front(weight, in_dims[1])
        n, *rest = input_size
        batch = info.batch_size
        if in_dims[1] is None:
            result = conv2d_grad_input(
                grad_output.flatten(0, 1), weight, [batch * n, *rest], *window, groups
            )
            return result.unflatten(0, (batch, n)), 0
        if in_dims[0] is None:
            grad_output = grad_output.expand(batch, *grad_output.shape)
        channels, *image = rest
        result = conv2d_grad_input(
            join_channels(grad_output),
            weight.flatten(0, 1),
            [n, batch * channels, *image],
            *window,
            batch * groups,
        )
        return result.unflatten(1, (batch, channels)).movedim(1, 0), 0


class Conv2dGradWeight(Function):
    """conv2d_grad_weight(grad_output, input, kernel_size, stride, padding, dilation, groups)"""

    @staticmethod
    def forward(grad_output: Tensor, input: Tensor, kernel_size: Any, *geometry: Any) -> Tensor:
        return kernels.conv2d_grad_weight(grad_output, input, kernel_size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, input, ctx.kernel_size, *ctx.geometry = inputs
        need_grad, need_input = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_output if need_input else None, input if need_grad else None)
        ctx.save_for_forward(grad_output, input)
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        need_grad, need_input = ctx.needs_input_grad[:2]
        by_grad = by_input = None
        if need_grad:
            by_grad = conv2d(conj(input), grad, None, *ctx.geometry)
        if need_input:
            by_input = conv2d_grad_input(conj(grad_output), grad, ctx.input_size, *ctx.geometry)
        return by_grad, by_input, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, input_t: Tensor | None, *_: Any) -> Tensor:
        grad_output, input = ctx.saved_tensors
        return add(
            grad_t is not None
            and conv2d_grad_weight(grad_t, input, ctx.kernel_size, *ctx.geometry),
            input_t is not None
            and conv2d_grad_weight(grad_output, input_t, ctx.kernel_size, *ctx.geometry),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        grad_output, input, kernel_size, *window, groups = args
        grad_output, input = to_front(grad_output, in_dims[0]), to_front(input, in_dims[1])
        batch = info.batch_size
        if in_dims[1] is None:
            # One input for all: the samples' outputs stand side by side within each group.
            stacked = grad_output.unflatten(2, (groups, -1)).movedim(0, 2).flatten(1, 3)
            result = conv2d_grad_weight(stacked, input, kernel_size, *window, groups)
            return split_outputs(result, batch, groups, dim=0), 0
        if in_dims[0] is None:
            grad_output = grad_output.expand(batch, *grad_output.shape)
        result = conv2d_grad_weight(
            join_channels(grad_output), join_channels(input), kernel_size, *window, batch * groups
        )
        return result.unflatten(0, (batch, -1)), 0


class Conv2dGradBias(Function):
    """conv2d_grad_bias(grad_output): the sum over images and pixels"""

    @staticmethod
    def forward(grad_output: Tensor) -> Tensor:
        return kernels.conv2d_grad_bias(grad_output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.size = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[:, None, None].expand(ctx.size)

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor) -> Tensor:
        return conv2d_grad_bias(grad_t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor, int]:
        samples = join_channels(grad_output.movedim(in_dims[0], 0))
        return conv2d_grad_bias(samples).unflatten(0, (info.batch_size, -1)), 0


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return call(Conv2d, ops.conv2d.default, input, weight, bias, *geometry)


def conv2d_without_channels(
    input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> Tensor:
    """Native's convolution of images with 0 channels: an output with 0 channels, zero gradients."""
    check_like("conv2d", input=input, weight=weight, bias=bias)
    size = conv2d_size("conv2d", input.shape, weight.shape, *geometry, smallest=0)
    terms = [input.sum(), weight.sum()]
    if bias is not None:
        check_shape("conv2d", bias, "bias", weight.shape[:1])
        terms.append(bias.sum())
    return input.new_zeros(input.shape[0], 0, *size) * sum(terms)


def conv2d_grad_input(
    grad_output: Tensor, weight: Tensor, input_size: Any, *geometry: Any
) -> Tensor:
    args = (grad_output, weight, list(input_size), *geometry)
    return call(Conv2dGradInput, ops.conv2d_grad_input.default, *args)


def conv2d_grad_weight(
    grad_output: Tensor, input: Tensor, kernel_size: Any, *geometry: Any
) -> Tensor:
    args = (grad_output, input, list(kernel_size), *geometry)
    return call(Conv2dGradWeight, ops.conv2d_grad_weight.default, *args)


def conv2d_grad_bias(grad_output: Tensor) -> Tensor:
    return call(Conv2dGradBias, ops.conv2d_grad_bias.default, grad_output)


def conj(tensor: Tensor) -> Tensor:
    """The conjugate that a complex gradient takes; the tensor itself where it is real."""
    return tensor.conj() if tensor.is_complex() else tensor


# ------------------------------------------------------------------------- folding batch dimensions


def to_front(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.movedim(dim, 0)


def join_channels(tensor: Tensor) -> Tensor:
    """(B, N, C, H, W) as (N, B C, H, W): samples become groups of channels."""
    return tensor.movedim(0, 1).flatten(1, 2)


def join_outputs(weight: Tensor, groups: int) -> Tensor:
    """(B, O, ...) as (B O, ...), each group holding its outputs of every sample."""
    return weight.unflatten(1, (groups, -1)).movedim(0, 1).flatten(0, 2)


def split_outputs(tensor: Tensor, batch: int, groups: int, dim: int) -> Tensor:
    """The reverse of join_outputs on dimension ``dim``; samples come to the front."""
    return tensor.unflatten(dim, (groups, batch, -1)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def add(*terms: Any) -> Any:
    """The sum of the terms that are there."""
    present = [term for term in terms if isinstance(term, Tensor)]
    return present[0] if len(present) == 1 else present[0] + present[1]


# ------------------------------------------------------------------------------------ fake kernels


DTYPES = (*FLOATING, *COMPLEX, *INTEGERS)


@torch.library.register_fake("dlops::conv2d")
def _(
    input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    check_like("conv2d", input=input, weight=weight, bias=bias)
    check_dtype("conv2d", input, "input", DTYPES)
    size = conv2d_size("conv2d", input.shape, weight.shape, stride, padding, dilation, groups)
    if bias is not None:
        check_shape("conv2d", bias, "bias", weight.shape[:1])
    return empty_images(input, (input.shape[0], weight.shape[0], *size), input, weight)


@torch.library.register_fake("dlops::conv2d_grad_input")
def _(grad_output: Tensor, weight: Tensor, input_size: Any, *geometry: Any) -> Tensor:
    op = "conv2d_grad_input"
    check_like(op, grad_output=grad_output, weight=weight)
    size = conv2d_size(op, input_size, weight.shape, *geometry)
    check_shape(op, grad_output, "grad_output", [input_size[0], weight.shape[0], *size])
    return empty_images(grad_output, input_size, grad_output, weight)


@torch.library.register_fake("dlops::conv2d_grad_weight")
def _(grad_output: Tensor, input: Tensor, kernel_size: Any, *geometry: Any) -> Tensor:
    op = "conv2d_grad_weight"
    check_like(op, grad_output=grad_output, input=input)
    shape = (grad_output.shape[1], input.shape[1] // geometry[-1], *kernel_size)
    size = conv2d_size(op, input.shape, shape, *geometry)
    check_shape(op, grad_output, "grad_output", [input.shape[0], shape[0], *size])
    return empty_images(grad_output, shape, input, grad_output)


@torch.library.register_fake("dlops::conv2d_grad_bias")
def _(grad_output: Tensor) -> Tensor:
    check("conv2d_grad_bias", grad_output.dim() == 4, "grad_output must have 4 dimensions")
    return grad_output.new_empty(grad_output.shape[1])


register(Conv2d, "conv2d", eager(Conv2d, backward=backward_at_once))
register(Conv2dGradInput, "conv2d_grad_input")
register(Conv2dGradWeight, "conv2d_grad_weight")
register(Conv2dGradBias, "conv2d_grad_bias")
