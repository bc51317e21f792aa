"""What the tests of every op do alike: values and gradients, compared with native.

Everything takes its tensors as they come, so that the same checks run on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tolerances import assert_accurate, comparable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Any]
Inputs = Sequence[Tensor | None]
Fill = Callable[[Sequence[int], int], Tensor]  # (size, seed) -> float64 tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(size: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(tuple(size), dtype=torch.float64, generator=generator(seed))


def small_integers(size: Sequence[int], seed: int = 0) -> Tensor:
    """-1, 0 and 1: products and sums of them are exact in every dtype, in any order."""
    values = torch.randint(-1, 2, tuple(size), generator=generator(seed))
    return values.to(torch.float64)


def cast(inputs: Inputs, dtype: torch.dtype) -> list[Any]:
    """Floating-point tensors in `dtype`, with their strides; the others as they are."""
    return [
        x.to(dtype, memory_format=torch.preserve_format)
        if x is not None and x.is_floating_point()
        else x
        for x in inputs
    ]


def leaves(inputs: Inputs) -> list[Any]:
    """The same memory as new leaves of the graph; floating-point ones require a gradient."""
    return [
        None if x is None else x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
        for x in inputs
    ]


def values_and_gradients(
    function: Function,
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    fill: Fill = normal,
) -> dict[str, Tensor]:
    """The output and the gradient of each differentiable input, for a fixed grad_output.

    `dtype` is what that grad_output is rounded to, if not the output's own.
    """
    arguments = leaves(inputs)
    output = function(*arguments)
    grad_output = fill(output.shape, 99).to(dtype or output.dtype).to(output)
    wanted = {f"gradient {i}": x for i, x in enumerate(arguments) if x is not None}
    wanted = {name: x for name, x in wanted.items() if x.requires_grad}
    gradients = torch.autograd.grad(output, list(wanted.values()), grad_output)
    return {"value": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def check_against_native(
    ours: Function, native: Function, inputs: Inputs, dtype: torch.dtype
) -> None:
    """Values and gradients of `ours` are as near to the float64 truth as native's."""
    inputs = cast(inputs, dtype)
    # Rounded to `dtype` first, so that every computation sees the same numbers.
    truth = values_and_gradients(native, cast(inputs, torch.float64), dtype)
    theirs = values_and_gradients(native, inputs)
    for name, result in values_and_gradients(ours, inputs).items():
        assert_accurate(result, theirs[name], truth[name], name)


def check_exact(ours: Function, native: Function, inputs: Inputs, dtype: torch.dtype) -> None:
    """On small integers every bit is as in float64."""
    truth = values_and_gradients(native, cast(inputs, torch.float64), fill=small_integers)
    results = values_and_gradients(ours, cast(inputs, dtype), fill=small_integers)
    for name, result in results.items():
        largest = truth[name].abs().max().item() if truth[name].numel() else 0
        assert largest <= 2 / torch.finfo(dtype).eps, f"{name}: the fill is not exact in {dtype}"
        assert result.dtype == dtype
        assert torch.equal(comparable(result), comparable(truth[name])), f"{name} in {dtype}"


def check_gradients(function: Function, inputs: Inputs) -> None:
    """gradcheck at PyTorch's default tolerances, in float64."""
    with threads(1):  # thousands of tiny calls
        assert torch.autograd.gradcheck(function, leaves(inputs))


def check_same_bits(results: Sequence[dict[str, Tensor]]) -> None:
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{name} differs from run to run"


def check_same_layout(ours: Tensor, native: Tensor, what: str) -> None:
    """Equal strides, but for dimensions of size 1 and empty tensors, where they mean nothing."""
    assert ours.shape == native.shape, f"{what}: {tuple(ours.shape)}, native {tuple(native.shape)}"
    if native.numel() == 0:
        return
    meaningful = [i for i, size in enumerate(native.shape) if size > 1]
    assert [ours.stride(i) for i in meaningful] == [native.stride(i) for i in meaningful], (
        f"{what}: strides {ours.stride()}, native {native.stride()}"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OpRecorder(TorchDispatchMode):
    """Notes the name of every operator that runs beneath it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


# The native operators that ours stand in for: none of them may run inside ours.
NATIVE_OPS = (
    "convolution",
    "conv2d",
    "max_pool2d",
    "im2col",
    "col2im",
    "softmax",
    "nll_loss",
    "cross_entropy",
    "binary_cross_entropy",
)


def check_runs_ours(function: Function, inputs: Inputs, expected: str) -> None:
    """Forward and backward run `dlops::expected...` operators and no native counterpart."""
    with OpRecorder() as recorder:
        values_and_gradients(function, inputs)
    assert any(name.startswith(f"dlops::{expected}") for name in recorder.names), recorder.names
    native = {name for name in recorder.names if name.startswith("aten::")}
    fallen_back = {name for name in native if any(op in name for op in NATIVE_OPS)}
    assert not fallen_back, f"fell back to {sorted(fallen_back)}"
