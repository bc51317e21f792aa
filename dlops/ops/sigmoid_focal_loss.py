"""Sigmoid focal loss: the loss, its product with a covector (vjp), with a tangent (jvp), and the
derivative of the vjp along a tangent (hvp). Together they differentiate the loss twice in any mode.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import (
    NONE,
    any_tensor,
    batched,
    call,
    empty_dense,
    kernels,
    no_third_derivative,
    reduce_rows,
    register,
    spread_grad,
    where_asked,
)
from dlops.ops.kept_gradient import eager_with_gradient
from dlops.ops.shapes import check_shape, check_sigmoid_focal_loss

ops = torch.ops.dlops

# Options: class_alpha (one for each class, or None), alpha, gamma, reduction.
OPTIONS = 4


class SigmoidFocalLoss(Function):
    """sigmoid_focal_loss(inputs, targets, *options)"""

    @staticmethod
    def forward(inputs: Tensor, targets: Tensor, *options: Any) -> Tensor:
        return kernels.sigmoid_focal_loss(inputs, targets, *options)

    @staticmethod
    def saved(inputs: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
        return inputs[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scalars = inputs[3:]
        tensors = SigmoidFocalLoss.saved(inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return SigmoidFocalLoss.backward_of(ctx, ctx.saved_tensors, grad_output)

    @staticmethod
    def backward_of(ctx: Any, saved: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.needs_input_grad[:2]
        grads = vjp(grad_output, *saved, *ctx.scalars, list(mask))
        return *where_asked(grads, mask), *[None] * OPTIONS

    @staticmethod
    def reduction(args: tuple[Any, ...]) -> int:
        return args[-1]

    @staticmethod
    def jvp(ctx: Any, inputs_t: Tensor | None, targets_t: Tensor | None, *_: Any) -> Tensor:
        return jvp(inputs_t, targets_t, *ctx.saved_tensors, *ctx.scalars)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        inputs, targets, class_alpha, alpha, gamma, reduction = batched(info, in_dims, args)
        operands, options = fold(inputs, targets, class_alpha)
        loss = sigmoid_focal_loss(*operands, options, alpha, gamma, NONE)
        return reduce_rows(unfold_last(loss, inputs), reduction), 0


class SigmoidFocalLossVjp(Function):
    """sigmoid_focal_loss_vjp(grad_output, inputs, targets, *options, mask)"""

    @staticmethod
    def forward(grad_output: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return kernels.sigmoid_focal_loss_vjp(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, logits, targets, class_alpha, *ctx.scalars, ctx.mask = inputs
        ctx.save_for_backward(grad_output, logits, targets, class_alpha)
        ctx.save_for_forward(grad_output, logits, targets, class_alpha)

    @staticmethod
    def backward(ctx: Any, *covectors: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, *rest = ctx.saved_tensors
        tangents = where_asked(covectors, ctx.mask)
        need_grad, *mask = ctx.needs_input_grad[:3]
        by_grad = jvp(*tangents, *rest, *ctx.scalars) if need_grad else None
        grads: Any = (None, None)
        if any(mask):
            grads = hvp(grad_output, *tangents, *rest, *ctx.scalars, list(mask))
        if by_grad is not None:
            by_grad = by_grad.reshape(grad_output.shape)
        return by_grad, *where_asked(grads, mask), *[None] * (OPTIONS + 1)

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        grad_output, *rest = ctx.saved_tensors
        inputs_t, targets_t = tangents[:2]
        result: Any = None
        if grad_t is not None:
            result = vjp(grad_t, *rest, *ctx.scalars, ctx.mask)
        if any_tensor(inputs_t, targets_t):
            second = hvp(grad_output, inputs_t, targets_t, *rest, *ctx.scalars, ctx.mask)
            result = (
                second
                if result is None
                else tuple(a + b for a, b in zip(result, second, strict=True))
            )
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        grad_output, inputs, targets, class_alpha, alpha, gamma, reduction, mask = batched(
            info, in_dims, args
        )
        grad_output = spread_grad(grad_output, inputs.shape, reduction)
        (grad, *operands), options = fold(grad_output, inputs, targets, class_alpha)
        grads = vjp(grad, *operands, options, alpha, gamma, NONE, mask)
        return unfold_masked(grads, inputs, mask)


class SigmoidFocalLossJvp(Function):
    """sigmoid_focal_loss_jvp(tangent_inputs, tangent_targets, inputs, targets, *options)"""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return kernels.sigmoid_focal_loss_jvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, alpha, gamma, reduction = inputs
        ctx.scalars = (alpha, gamma, reduction)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs_t, targets_t, *rest = ctx.saved_tensors
        linear, quadratic = ctx.needs_input_grad[:2], ctx.needs_input_grad[2:4]
        first: Any = (None, None)
        second: Any = (None, None)
        if any(linear):
            first = vjp(grad, *rest, *ctx.scalars, list(linear))
        if any(quadratic):
            second = hvp(grad, inputs_t, targets_t, *rest, *ctx.scalars, list(quadratic))
        grads = (*where_asked(first, linear), *where_asked(second, quadratic))
        return *grads, *[None] * OPTIONS

    @staticmethod
    def jvp(ctx: Any, inputs_tt: Any, targets_tt: Any, *tangents: Any) -> Tensor:
        inputs_t, targets_t, *rest = ctx.saved_tensors
        alpha, gamma, reduction = ctx.scalars
        result: Any = 0
        if any_tensor(inputs_tt, targets_tt):
            result = jvp(inputs_tt, targets_tt, *rest, *ctx.scalars)
        moved = tangents[:2]
        if any_tensor(*moved):
            ones = torch.ones_like(rest[0])
            mask = [tangent is not None for tangent in moved]
            slopes = hvp(ones, inputs_t, targets_t, *rest, alpha, gamma, NONE, mask)
            terms = sum(s * t for s, t in zip(slopes, moved, strict=True) if t is not None)
            result = result + reduce_rows(terms[None], reduction)[0]
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *tensors, class_alpha, alpha, gamma, reduction = batched(info, in_dims, args)
        operands, options = fold(*tensors, class_alpha)
        tangent = jvp(*operands, options, alpha, gamma, NONE)
        return reduce_rows(unfold_last(tangent, tensors[2]), reduction), 0


class SigmoidFocalLossHvp(Function):
    """sigmoid_focal_loss_hvp(grad_output, tangent_inputs, tangent_targets, inputs, targets,
    *options, mask)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return kernels.sigmoid_focal_loss_hvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        no_third_derivative("sigmoid_focal_loss")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        no_third_derivative("sigmoid_focal_loss")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        grad_output, *tensors, class_alpha, alpha, gamma, reduction, mask = batched(
            info, in_dims, args
        )
        inputs = tensors[2]
        grad_output = spread_grad(grad_output, inputs.shape, reduction)
        operands, options = fold(grad_output, *tensors, class_alpha)
        grads = hvp(*operands, options, alpha, gamma, NONE, mask)
        return unfold_masked(grads, inputs, mask)


def sigmoid_focal_loss(*args: Any) -> Tensor:
    return call(SigmoidFocalLoss, ops.sigmoid_focal_loss.default, *args)


def vjp(*args: Any) -> tuple[Tensor, Tensor]:
    return call(SigmoidFocalLossVjp, ops.sigmoid_focal_loss_vjp.default, *args)


def jvp(*args: Any) -> Tensor:
    return call(SigmoidFocalLossJvp, ops.sigmoid_focal_loss_jvp.default, *args)


def hvp(*args: Any) -> tuple[Tensor, Tensor]:
    return call(SigmoidFocalLossHvp, ops.sigmoid_focal_loss_hvp.default, *args)


# ------------------------------------------------------------------------- folding batch dimensions


def fold(*tensors: Any) -> tuple[list[Any], Tensor | None]:
    """Elementwise operands, batched in front, and the per-class alpha that goes with them.

    An alpha for each sample moves the samples into the last dimension, beside the classes.
    """
    *operands, class_alpha = tensors
    if class_alpha is None:
        return list(operands), None
    moved = [t if t is None else t.movedim(0, -2).flatten(-2) for t in operands]
    return moved, class_alpha.flatten()


def unfold_last(result: Tensor, like: Tensor) -> Tensor:
    """The reverse of fold for a result."""
    if result.shape == like.shape:
        return result
    return result.unflatten(-1, (like.shape[0], like.shape[-1])).movedim(-2, 0)


def unfold_masked(grads: Any, like: Tensor, mask: list[bool]) -> Any:
    results = tuple(
        unfold_last(grad, like) if asked else grad for grad, asked in zip(grads, mask, strict=True)
    )
    return results, tuple(0 if asked else None for asked in mask)


# ------------------------------------------------------------------------------------ fake kernels


def fake_elements(inputs: Tensor, class_alpha: Tensor | None) -> Tensor:
    # A class is a position in the last dimension, which is then the innermost in memory, too.
    if class_alpha is None:
        return empty_dense(inputs)
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def fake_loss(inputs: Tensor, class_alpha: Tensor | None, reduction: int) -> Tensor:
    return fake_elements(inputs, class_alpha) if reduction == NONE else inputs.new_empty(())


def fake_grads(op: str, grad_output: Tensor, args: Any) -> tuple[Tensor, ...]:
    inputs, targets, class_alpha, _, _, reduction, mask = args
    check_sigmoid_focal_loss(op, inputs, targets, class_alpha)
    if reduction == NONE:
        check_shape(op, grad_output, "grad_output", inputs.shape)
    empty = inputs.new_empty(0)
    return tuple(fake_elements(inputs, class_alpha) if asked else empty for asked in mask)


@torch.library.register_fake("dlops::sigmoid_focal_loss")
def _(inputs: Tensor, targets: Tensor, class_alpha: Any, *options: Any) -> Tensor:
    check_sigmoid_focal_loss("sigmoid_focal_loss", inputs, targets, class_alpha)
    return fake_loss(inputs, class_alpha, options[-1])


@torch.library.register_fake("dlops::sigmoid_focal_loss_and_grad")
def _(inputs: Tensor, targets: Tensor, class_alpha: Any, *options: Any) -> tuple[Tensor, Tensor]:
    check_sigmoid_focal_loss("sigmoid_focal_loss_and_grad", inputs, targets, class_alpha)
    loss = fake_loss(inputs, class_alpha, options[-1])
    return loss, fake_elements(inputs, class_alpha)


@torch.library.register_fake("dlops::sigmoid_focal_loss_scale_grad")
def _(grad_inputs: Tensor, grad_output: Any, inputs: Tensor, *args: Any) -> None:
    check_sigmoid_focal_loss("sigmoid_focal_loss_scale_grad", inputs, *args[:2])


@torch.library.register_fake("dlops::sigmoid_focal_loss_vjp")
def _(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_grads("sigmoid_focal_loss_vjp", grad_output, args)


@torch.library.register_fake("dlops::sigmoid_focal_loss_jvp")
def _(inputs_t: Any, targets_t: Any, inputs: Tensor, *args: Any) -> Tensor:
    check_sigmoid_focal_loss("sigmoid_focal_loss_jvp", inputs, *args[:2])
    return fake_loss(inputs, args[1], args[-1])


@torch.library.register_fake("dlops::sigmoid_focal_loss_hvp")
def _(grad_output: Any, inputs_t: Any, targets_t: Any, *args: Any) -> Any:
    return fake_grads("sigmoid_focal_loss_hvp", grad_output, args)


with_gradient = eager_with_gradient(
    SigmoidFocalLoss,
    kernels.sigmoid_focal_loss_and_grad,
    kernels.sigmoid_focal_loss_scale_grad,
)
register(SigmoidFocalLoss, "sigmoid_focal_loss", with_gradient)
register(SigmoidFocalLossVjp, "sigmoid_focal_loss_vjp")
register(SigmoidFocalLossJvp, "sigmoid_focal_loss_jvp")
register(SigmoidFocalLossHvp, "sigmoid_focal_loss_hvp")
