"""Losses whose gradient is worked out together with the loss and waits for the backward pass, which
then reads neither logits nor targets again."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from dlops.ops.common import run, traced

# In narrower types the gradient of a mean could become too small before it is multiplied by a
# scaled loss's gradient, and would be rounded twice.
DTYPES = (torch.float64, torch.float32)


def eager_with_gradient(function: Any, op: Callable[..., Any]) -> Any:
    """The twin of a loss's Function that runs where no transform is active (`common.eager`).

    ``op`` returns what ``function.forward`` does and the gradient of the first input for a
    grad_output of ones. ``function`` says with ``backward_of(ctx, saved, grad_output)`` what the
    backward is without it, and with ``factor(ctx, saved, grad_output)`` what to multiply it by.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        grad = None
        # What a hook packs may be in use elsewhere.
        ctx.owns_gradient = not torch._C._autograd._top_saved_tensors_default_hooks(False)
        if keeps_gradient(ctx, args[0]):
            *outputs, grad = run(op, *args)
            output = tuple(outputs) if len(outputs) > 1 else outputs[0]
        else:
            output = function.forward(*args)
        function.setup_context(ctx, args, output)
        ctx.save_for_backward(*function.saved(args, output), grad)
        return output

    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *saved, grad = ctx.saved_tensors
        if grad is None or not is_plain(grad_output):
            return function.backward_of(ctx, saved, grad_output)
        factor = function.factor(ctx, saved, grad_output)
        if factor.dim() == 0 and not math.isfinite(factor.item()):
            return function.backward_of(ctx, saved, grad_output)
        keep = not ctx.owns_gradient or torch._C._autograd._get_current_graph_task_keep_graph()
        result = grad * factor if keep else scaled(grad, factor)
        return result, *[None] * (len(ctx.needs_input_grad) - 1)

    parts = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        "setup_context": Function.setup_context,
    }
    return type(function)(function.__name__, (function,), parts)


def keeps_gradient(ctx: Any, input: Tensor) -> bool:
    by_input, by_target, *_ = ctx.needs_input_grad
    wanted = by_input and not by_target and not is_derived_or_recorded()
    return wanted and input.dtype in DTYPES and input.device.type == "cpu"


def is_plain(grad_output: Tensor) -> bool:
    """Whether backward is for numbers alone: not to be differentiated again in either mode, not for
    many gradients at once, and with nobody who records it."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)
    derived = torch.is_grad_enabled() or batched or is_derived_or_recorded()
    return type(grad_output) is Tensor and not derived


def is_derived_or_recorded() -> bool:
    derived = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return derived or traced() or torch._C._len_torch_dispatch_stack() > 0


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor`` in the memory of ``grad``."""
    if factor.dim() == 0 and factor.item() == 1:
        return grad
    return grad.mul_(factor)
