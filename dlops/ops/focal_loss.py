"""Softmax focal loss: the loss, its product with a covector (vjp), with a tangent (jvp), and the
derivative of the vjp along a tangent (hvp). Together they differentiate the loss twice in any mode.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dlops.ops.common import (
    MEAN,
    NONE,
    any_tensor,
    batched,
    call,
    empty_dense,
    kernels,
    no_third_derivative,
    reduce_rows,
    register,
    where_asked,
)
from dlops.ops.kept_gradient import eager_with_gradient
from dlops.ops.shapes import check_shape, focal_loss_shape

ops = torch.ops.dlops

# Options: weight (one for each class, or None), gamma, ignore_index, reduction, label_smoothing.
OPTIONS = 5

IGNORE_NOTHING = -100

NO_WEIGHT_GRADIENT = (
    "focal_loss: with class indices as target there is no derivative with respect to weight, as in "
    "torch.nn.functional.cross_entropy; detach weight, or give class probabilities as target"
)


class FocalLoss(Function):
    """focal_loss(input, target, *options) -> (loss, normalizer)"""

    @staticmethod
    def forward(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return kernels.focal_loss(input, target, *options)

    @staticmethod
    def saved(inputs: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
        input, target, weight, *_ = inputs
        return outputs[1], input, target, weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.scalars = inputs[3:]
        ctx.mark_non_differentiable(output[1])
        tensors = FocalLoss.saved(inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return FocalLoss.backward_of(ctx, ctx.saved_tensors, grad_output)

    @staticmethod
    def backward_of(ctx: Any, saved: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.needs_input_grad[:2]
        grads = vjp(grad_output, *saved, *ctx.scalars, list(mask))
        return *where_asked(grads, mask), *[None] * OPTIONS

    @staticmethod
    def reduction(args: tuple[Any, ...]) -> int:
        return args[-2]

    @staticmethod
    def jvp(ctx: Any, input_t: Any, target_t: Any, *_: Any) -> tuple[Tensor, None]:
        normalizer, *rest = ctx.saved_tensors
        return jvp(normalizer, input_t, target_t, *rest, *ctx.scalars), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        batch = Batch(info, in_dims, args)
        losses = batch.unfold(focal_loss(batch.input, batch.target, *batch.options)[0])
        normalizer = batch.normalizer()
        if batch.reduction == NONE:
            return (losses, normalizer), (0, 0)
        loss = reduce_rows(losses, batch.reduction)
        if batch.reduction == MEAN:
            loss = losses.reshape(batch.size, -1).sum(1) / normalizer.to(losses.dtype)
        return (loss, normalizer), (0, 0)


class FocalLossVjp(Function):
    """focal_loss_vjp(grad_output, normalizer, input, target, *options, mask)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return kernels.focal_loss_vjp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, gamma, ignore_index, reduction, label_smoothing, ctx.mask = inputs
        ctx.scalars = (gamma, ignore_index, reduction, label_smoothing)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *covectors: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, normalizer, *rest = ctx.saved_tensors
        tangents = where_asked(covectors, ctx.mask)
        need_grad, mask = ctx.needs_input_grad[0], ctx.needs_input_grad[2:4]
        by_grad = None
        if need_grad:
            by_grad = jvp(normalizer, *tangents, *rest, *ctx.scalars).reshape(grad_output.shape)
        grads: Any = (None, None)
        if any(mask):
            grads = hvp(grad_output, normalizer, *tangents, *rest, *ctx.scalars, list(mask))
        return by_grad, None, *where_asked(grads, mask), *[None] * (OPTIONS + 1)

    @staticmethod
    def jvp(ctx: Any, grad_t: Any, _: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grad_output, normalizer, *rest = ctx.saved_tensors
        along = tangents[:2]
        result: Any = None
        if grad_t is not None:
            result = vjp(grad_t, normalizer, *rest, *ctx.scalars, ctx.mask)
        if any_tensor(*along):
            second = hvp(grad_output, normalizer, *along, *rest, *ctx.scalars, ctx.mask)
            result = (
                second
                if result is None
                else tuple(a + b for a, b in zip(result, second, strict=True))
            )
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        grad_output, normalizer, *rest, mask = args
        batch = Batch(info, in_dims[2:-1], rest)
        grad = batch.spread(*batched(info, in_dims[:2], (grad_output, normalizer)))
        grads = vjp(grad, batch.ones(), batch.input, batch.target, *batch.options, mask)
        return batch.unfold_masked(grads, mask)


class FocalLossJvp(Function):
    """focal_loss_jvp(normalizer, tangent_input, tangent_target, input, target, *options)"""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return kernels.focal_loss_jvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, gamma, ignore_index, reduction, label_smoothing = inputs
        ctx.scalars = (gamma, ignore_index, reduction, label_smoothing)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalizer, input_t, target_t, *rest = ctx.saved_tensors
        linear, quadratic = ctx.needs_input_grad[1:3], ctx.needs_input_grad[3:5]
        first: Any = (None, None)
        second: Any = (None, None)
        if any(linear):
            first = vjp(grad, normalizer, *rest, *ctx.scalars, list(linear))
        if any(quadratic):
            second = hvp(grad, normalizer, input_t, target_t, *rest, *ctx.scalars, list(quadratic))
        grads = (*where_asked(first, linear), *where_asked(second, quadratic))
        return None, *grads, *[None] * OPTIONS

    @staticmethod
    def jvp(ctx: Any, _: Any, input_tt: Any, target_tt: Any, *tangents: Any) -> Tensor:
        normalizer, input_t, target_t, *rest = ctx.saved_tensors
        gamma, ignore_index, reduction, label_smoothing = ctx.scalars
        result: Any = 0
        if any_tensor(input_tt, target_tt):
            result = jvp(normalizer, input_tt, target_tt, *rest, *ctx.scalars)
        moved = tangents[:2]
        if any_tensor(*moved):
            classes = 1 if rest[0].dim() > 1 else 0
            ones = torch.ones_like(rest[0].select(classes, 0))
            mask = [tangent is not None for tangent in moved]
            options = (gamma, ignore_index, NONE, label_smoothing)
            slopes = hvp(ones, normalizer, input_t, target_t, *rest, *options, mask)
            terms = sum(s * t for s, t in zip(slopes, moved, strict=True) if t is not None)
            terms = terms.sum(classes)
            if reduction != NONE:
                terms = terms.sum() / normalizer if reduction == MEAN else terms.sum()
            result = result + terms
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        normalizer, *tangents = batched(info, in_dims[:3], args[:3])
        batch = Batch(info, in_dims[3:], args[3:])
        folded = batch.fold_tangents(*tangents)
        result = batch.unfold(jvp(batch.ones(), *folded, batch.input, batch.target, *batch.options))
        if batch.reduction == NONE:
            return result, 0
        result = result.reshape(batch.size, -1).sum(1)
        return (result / normalizer if batch.reduction == MEAN else result), 0


class FocalLossHvp(Function):
    """focal_loss_hvp(grad_output, normalizer, tangent_input, tangent_target, input, target,
    *options, mask)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return kernels.focal_loss_hvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        no_third_derivative("focal_loss")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        no_third_derivative("focal_loss")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        front = batched(info, in_dims[:4], args[:4])
        *rest, mask = args[4:]
        batch = Batch(info, in_dims[4:-1], rest)
        folded = batch.fold_tangents(*front[2:])
        grad = batch.spread(front[0], front[1])
        grads = hvp(grad, batch.ones(), *folded, batch.input, batch.target, *batch.options, mask)
        return batch.unfold_masked(grads, mask)


def focal_loss(*args: Any) -> tuple[Tensor, Tensor]:
    return call(FocalLoss, ops.focal_loss.default, *args)


def vjp(*args: Any) -> tuple[Tensor, Tensor]:
    return call(FocalLossVjp, ops.focal_loss_vjp.default, *args)


def jvp(*args: Any) -> Tensor:
    return call(FocalLossJvp, ops.focal_loss_jvp.default, *args)


def hvp(*args: Any) -> tuple[Tensor, Tensor]:
    return call(FocalLossHvp, ops.focal_loss_hvp.default, *args)


def weighted_target(target: Tensor, weight: Tensor, label_smoothing: float, dim: int) -> Tensor:
    """Class probabilities with the smoothing and the weight multiplied in.

    The loss is linear in them, so without weight and smoothing it is the same for this target.
    ``weight`` broadcasts over ``target``, whose classes are in ``dim``.
    """
    return target.mul(1 - label_smoothing).add(label_smoothing / target.shape[dim]).mul(weight)


class Batch:
    """The arguments of a batch of losses as those of one loss: samples join the first dimension.

    Inside, losses are not reduced: `spread` and the rules above apply each sample's own normalizer.
    One loss has one weight, so where each sample has its own it goes into the target
    (`weighted_target`); `slope` is then the factor of a change of the caller's target.
    """

    def __init__(self, info: Any, in_dims: tuple[Any, ...], args: Any) -> None:
        self.size = info.batch_size
        input, self.rows = batched(info, in_dims[:2], args[:2])
        self.weight, gamma, self.ignore_index, self.reduction, smoothing = args[2:7]
        # (B, C) already is a batch of single rows.
        self.single = input.dim() == 2
        self.classes = 1 if self.single else 2
        self.slope: Tensor | None = None
        target = self.rows
        self.options = (self.weight, gamma, self.ignore_index, NONE, smoothing)
        if in_dims[2] is not None:
            self.weight = self.weight.movedim(in_dims[2], 0)
            target = self.weighted(input, smoothing)
            self.options = (None, gamma, IGNORE_NOTHING, NONE, 0.0)
        self.input, self.target = self.fold(input), self.fold(target)

    def weighted(self, input: Tensor, smoothing: float) -> Tensor:
        """The target with each sample's own weight in it, as class probabilities."""
        shape = [1] * input.dim()
        shape[0], shape[self.classes] = self.weight.shape
        weight = self.weight.view(shape)
        if self.rows.is_floating_point():
            self.slope = weight * (1 - smoothing)
            return weighted_target(self.rows, weight, smoothing, self.classes)
        labels = self.rows.unsqueeze(self.classes)
        numbers = torch.arange(shape[self.classes], device=labels.device)
        one_hot = labels == numbers.view(-1, *[1] * (input.dim() - self.classes - 1))
        target = weighted_target(one_hot.to(input.dtype), weight, smoothing, self.classes)
        return target * (labels != self.ignore_index)

    def fold(self, tensor: Any) -> Any:
        return tensor if tensor is None or self.single else tensor.flatten(0, 1)

    def fold_tangents(self, input_t: Any, target_t: Any) -> tuple[Any, Any]:
        if self.slope is not None and target_t is not None:
            target_t = target_t * self.slope
        return self.fold(input_t), self.fold(target_t)

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor if self.single else tensor.unflatten(0, (self.size, -1))

    def unfold_masked(self, grads: Any, mask: list[bool]) -> Any:
        by_input, by_target = (
            self.unfold(grad) if asked else grad for grad, asked in zip(grads, mask, strict=True)
        )
        if mask[1] and self.slope is not None:
            by_target = by_target * self.slope
        return (by_input, by_target), tuple(0 if asked else None for asked in mask)

    def ones(self) -> Tensor:
        """A normalizer that changes nothing."""
        return torch.ones((), dtype=fake_sum_type(self.input.dtype), device=self.input.device)

    def normalizer(self) -> Tensor:
        """What each sample's mean divides by."""
        dtype = fake_sum_type(self.input.dtype)
        if self.rows.is_floating_point():
            rows = self.rows.numel() // self.size // self.rows.shape[self.classes]
            return torch.full((self.size,), rows, dtype=dtype, device=self.rows.device)
        labels = self.rows.reshape(self.size, -1)
        kept = labels != self.ignore_index
        weights = kept.to(dtype)
        if self.weight is not None:
            each = self.weight.to(dtype).expand(self.size, -1)
            weights = weights * each.gather(1, labels.where(kept, 0))
        return weights.sum(1)

    def spread(self, grad_output: Tensor, normalizer: Tensor) -> Tensor:
        """The gradient of each unreduced loss."""
        if self.reduction == NONE:
            return self.fold(grad_output)
        if self.reduction == MEAN:
            grad_output = (grad_output / normalizer).to(grad_output.dtype)
        if self.single:
            return grad_output
        shape = (self.input.shape[0], *self.input.shape[2:])
        repeated = grad_output.repeat_interleave(shape[0] // self.size)
        return repeated.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


# ------------------------------------------------------------------------------------ fake kernels


def fake_sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def fake_loss(op: str, input: Tensor, args: Any) -> Tensor:
    target, weight, _, ignore_index, reduction, label_smoothing = args
    shape = focal_loss_shape(op, input, target, weight, ignore_index, label_smoothing)
    return input.new_empty(shape if reduction == NONE else ())


def fake_grads(op: str, grad_output: Tensor, input: Tensor, args: Any) -> tuple[Tensor, ...]:
    *args, mask = args
    loss = fake_loss(op, input, args)
    if args[-2] == NONE:
        check_shape(op, grad_output, "grad_output", loss.shape)
    return tuple(empty_dense(input) if asked else input.new_empty(0) for asked in mask)


@torch.library.register_fake("dlops::focal_loss")
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    loss = fake_loss("focal_loss", input, args)
    return loss, input.new_empty((), dtype=fake_sum_type(input.dtype))


@torch.library.register_fake("dlops::focal_loss_and_grad")
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = fake_loss("focal_loss_and_grad", input, args)
    normalizer = input.new_empty((), dtype=fake_sum_type(input.dtype))
    return loss, normalizer, empty_dense(input)


@torch.library.register_fake("dlops::focal_loss_scale_grad")
def _(grad_input: Tensor, grad_output: Any, normalizer: Any, input: Tensor, *args: Any) -> None:
    fake_loss("focal_loss_scale_grad", input, args)


@torch.library.register_fake("dlops::focal_loss_vjp")
def _(grad_output: Tensor, normalizer: Any, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_grads("focal_loss_vjp", grad_output, input, args)


@torch.library.register_fake("dlops::focal_loss_jvp")
def _(normalizer: Any, input_t: Any, target_t: Any, input: Tensor, *args: Any) -> Tensor:
    return fake_loss("focal_loss_jvp", input, args)


@torch.library.register_fake("dlops::focal_loss_hvp")
def _(
    grad_output: Any, normalizer: Any, input_t: Any, target_t: Any, input: Tensor, *args: Any
) -> Any:
    return fake_grads("focal_loss_hvp", grad_output, input, args)


with_gradient = eager_with_gradient(
    FocalLoss, kernels.focal_loss_and_grad, kernels.focal_loss_scale_grad
)
register(FocalLoss, "focal_loss", with_gradient)
register(FocalLossVjp, "focal_loss_vjp")
register(FocalLossJvp, "focal_loss_jvp")
register(FocalLossHvp, "focal_loss_hvp")
