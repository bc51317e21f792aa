"""Losses whose gradient is worked out together with the loss and waits for the backward pass, which
then reads neither logits nor targets again, except on a GPU where grad_output is not 1."""

from typing import Any

import torch
from torch import Tensor

from dlops import _C
from dlops.ops.common import NONE, eager, traced, transformed

# On the CPU backward multiplies what waits. In narrower types the gradient of a mean could become
# too small before it is multiplied by a scaled loss's gradient, and would be rounded twice.
MULTIPLIED = (torch.float64, torch.float32)
# Arguments of a loss that are tensors or None, before its scalars.
TENSORS = 3


def eager_with_gradient(function: Any, and_grad: Any, scale_grad: Any) -> Any:
    """The twin of a loss's Function that runs where no transform is active (`common.eager`).

    The kernel ``and_grad`` returns what ``function.forward`` does, the loss first, and the gradient
    of the first input for a grad_output of ones. ``scale_grad(gradient, grad_output, *saved,
    *ctx.scalars)`` turns that, in place, into the gradient for another one, without waiting for a
    GPU.
    ``function.backward_of(ctx, saved, grad_output)`` is the backward without either.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        grad = None
        # What a hook packs may be in use elsewhere.
        ctx.owns_gradient = not torch._C._autograd._top_saved_tensors_default_hooks(False)
        ctx.capture = capture(args[0])
        if keeps_gradient(function, ctx, args):
            *outputs, grad = and_grad(*args)
        else:
            outputs = function.forward(*args)
            if isinstance(outputs, Tensor):
                outputs = (outputs,)
        ctx.scalars = args[TENSORS:]
        ctx.set_materialize_grads(False)  # nothing is filled with zeros for the others
        ctx.save_for_backward(*function.saved(args, outputs), grad)
        # The loss; what else there is has no gradient, and no caller needs it here.
        return outputs[0] if len(outputs) == 1 else (outputs[0], *(None for _ in outputs[1:]))

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, grad = ctx.saved_tensors
        if grad is None or not is_plain(grad_output):
            return function.backward_of(ctx, saved, grad_output)
        result = grad if gives_away(ctx, grad) else grad.clone()
        scale_grad(result, grad_output, *saved, *ctx.scalars)
        return result, *[None] * (len(ctx.needs_input_grad) - 1)

    return eager(function, forward=forward, backward=backward)


def keeps_gradient(function: Any, ctx: Any, args: tuple[Any, ...]) -> bool:
    by_input, by_target, *_ = ctx.needs_input_grad
    recorded = torch._C._len_torch_dispatch_stack() > 0
    return by_input and not by_target and not recorded and gains(function, args)


def gains(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a gradient that waits saves time and costs no digits."""
    input = args[0]
    if input.device.type == "cuda":
        # Nothing is read or written in backward for a grad_output of 1, which reduced losses have.
        # For another the gradient is worked out again, in any type.
        return function.reduction(args) != NONE
    return input.device.type == "cpu" and input.dtype in MULTIPLIED


def gives_away(ctx: Any, grad: Tensor) -> bool:
    """Whether the memory of the gradient that waited may become the result."""
    # A captured backward may be replayed more often than the forward that fills the memory, unless
    # both are in one graph.
    once = ctx.owns_gradient and ctx.capture == capture(grad)
    return once and not torch._C._autograd._get_current_graph_task_keep_graph()


def capture(tensor: Tensor) -> int:
    """The number of the CUDA graph that the work on ``tensor`` is captured for; 0: none."""
    return _C.capture(tensor.device.index) if tensor.device.type == "cuda" else 0


def is_plain(grad_output: Tensor) -> bool:
    """Whether backward is for numbers alone: not to be differentiated again in either mode, not for
    many gradients at once, and with nobody who records it."""
    if type(grad_output) is not Tensor or torch.is_grad_enabled():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)
    return not (batched or is_derived_or_recorded())


def is_derived_or_recorded() -> bool:
    return transformed() or traced() or torch._C._len_torch_dispatch_stack() > 0
