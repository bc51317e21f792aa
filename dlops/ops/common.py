"""What the ops share: argument normalisation, autocast, how an op is called eagerly or traced."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function, forward_ad

from dlops import _C

kernels = _C.kernels

# at::Reduction's numbers.
NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}

# Asked once: torch 2.11's compiler cannot trace the question.
AUTOCAST_DEVICES = {name for name in ("cpu", "cuda") if torch.amp.is_autocast_available(name)}


def pair(value: int | Sequence[int], name: str, op: str, single: bool = True) -> list[int]:
    """``value`` as [height, width]; an int, or with ``single`` one in a list, stands for both."""
    if type(value) is int and fits(value):
        return [value, value]
    if isinstance(value, (list, tuple)):
        if not all(is_int(entry) and fits(entry) for entry in value):
            if all(is_int(entry) and (fits(entry) or reserved(entry)) for entry in value):
                raise RuntimeError(f"{op}: {name} must not be negative, got {tuple(value)}")
            raise TypeError(f"{op}: {name} must be ints of 64 bits, got {tuple(value)}")
        if len(value) == 1 and single:
            return [value[0], value[0]]
        if len(value) != 2:
            raise RuntimeError(f"{op}: {name} must be one int or two, got {tuple(value)}")
        return list(value)
    if not single and is_int(value) and not (fits(value) or reserved(value)):  # native's type
        raise TypeError(f"{op}: {name} must fit in 64 bits, got {value}")
    number = check_int(value, name, op)
    if reserved(number):
        raise RuntimeError(f"{op}: {name} must not be negative, got {value}")
    return [number, number]


def check_tensor(value: Any, name: str, op: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def fits(value: int) -> bool:
    """Whether a kernel can take it in a list, as a 64-bit integer; a traced one always does."""
    return torch.compiler.is_compiling() or -(2**62) <= value < 2**63


def reserved(value: int) -> bool:
    """Whether torch takes the 64-bit integer, in a list, for a symbolic one, and fails on that."""
    return not torch.compiler.is_compiling() and -(2**63) <= value < -(2**62)


def check_int(value: Any, name: str, op: str) -> int:
    if not is_int(value):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if not (fits(value) or reserved(value)):
        raise ValueError(f"{op}: {name} must fit in 64 bits, got {value}")
    return value


def check_number(value: Any, name: str, op: str) -> None:
    if not isinstance(value, (numbers.Real, Tensor, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def check_bool(value: Any, name: str, op: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def reduction_number(reduction: str, op: str) -> int:
    """The number of a reduction's name, or ValueError."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
        )
    return REDUCTIONS[reduction]


def autocast(policy: str, *tensors: Any) -> tuple[Any, ...]:
    """Casts as torch's autocast casts the native op: to "lower_precision" or to "float32".

    Outside autocast, and for float64 and non-floating tensors, nothing changes.
    """
    lead = next(t for t in tensors if t is not None)
    device = lead.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device) if policy == "lower_precision" else torch.float32
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records what is called."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def call(function: Any, op: Callable[..., Any], *args: Any) -> Any:
    """Runs an op: traced through the registered op, else through its autograd.Function, or its
    kernel alone where nothing is differentiable.

    ``torch.compile`` cannot trace a Function that defines ``jvp``, nor can ``torch.jit.save`` write
    one; the op's backward is registered from the same code, so both have the same derivatives.
    """
    if traced():
        return op(*args)
    if transformed():
        return function.apply(*args)
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return function.eager.apply(*args)
    return function.kernel(*args)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether something may ask for a derivative with respect to one of ``tensors``."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return not torch.compiler.is_compiling() and transformed()


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward mode differentiates with respect to ``tensor``."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def eager(function: Any, **parts: Callable[..., Any]) -> Any:
    """The same Function without ``setup_context``, which transforms need: with it, every call looks
    up the signature of ``forward``, which takes longer than a small kernel. ``parts`` are methods
    that differ where no transform is active."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    own = {name: staticmethod(part) for name, part in ({"forward": forward} | parts).items()}
    members = own | {"setup_context": Function.setup_context}
    return type(function)(function.__name__, (function,), members)


def register(function: Any, name: str, twin: Any = None) -> None:
    """Gives the raw op the derivatives and the vmap rule of its autograd.Function. ``twin`` is what
    runs where no transform is active, if it is more than the same without its signature."""
    function.kernel = getattr(kernels, name)
    function.eager = twin or eager(function)
    torch.library.register_autograd(
        f"dlops::{name}", function.backward, setup_context=_setup_of(function)
    )
    torch.library.register_vmap(f"dlops::{name}", function.vmap)


def _setup_of(function: Any) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Forward mode belongs to the Function: a registered op has no place to keep tensors for it.
        ctx.save_for_forward = _keep_nothing
        function.setup_context(ctx, inputs, output)

    return setup_context


def _keep_nothing(*tensors: Tensor | None) -> None:
    pass


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where a tensor's strides say so, as the kernels decide it."""
    last = any(
        suggest_memory_format(tensor) == torch.channels_last
        for tensor in tensors
        if tensor.dim() == 4
    )
    return torch.channels_last if last else torch.contiguous_format


def empty_images(like: Tensor, shape: Any, *leads: Tensor, dtype: Any = None) -> Tensor:
    """What a kernel allocates for images: of ``like``'s type, laid out as ``leads`` say."""
    return torch.empty(
        tuple(shape),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format(*leads),
    )


# --------------------------------------------------------------------------- for the losses' rules


def empty_dense(like: Tensor) -> Tensor:
    """What a loss's kernel allocates in the shape of ``like``: without gaps, its classes where
    ``like`` has them."""
    return torch.empty_like(like, memory_format=suggest_memory_format(like))


def any_tensor(*values: Any) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def where_asked(grads: Any, mask: Any) -> list[Tensor | None]:
    """The gradients that were asked for; a kernel leaves an empty tensor in place of the others."""
    return [grad if asked else None for grad, asked in zip(grads, mask, strict=True)]


def no_third_derivative(op: str) -> NoReturn:
    raise NotImplementedError(f"{op} has derivatives up to the second order; a third was asked for")


def batched(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments of a vmap rule with the batch dimension of every tensor in front."""

    def front(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        if dim is None:
            return value.expand(info.batch_size, *value.shape)
        return value.movedim(dim, 0)

    return [front(value, dim) for value, dim in zip(args, in_dims, strict=True)]


def reduce_rows(losses: Tensor, reduction: int) -> Tensor:
    """Reduces everything but the first dimension."""
    if reduction == NONE:
        return losses
    flat = losses.reshape(losses.shape[0], -1)
    return flat.mean(1) if reduction == MEAN else flat.sum(1)


def spread_grad(grad_output: Tensor, shape: Any, reduction: int) -> Tensor:
    """The gradient of a batch of reduced losses as that of each element."""
    if reduction == NONE:
        return grad_output
    count = math.prod(shape[1:])
    grad = grad_output.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    return grad / count if reduction == MEAN else grad
