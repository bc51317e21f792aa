"""The losses' gradient that is worked out with the loss: the same bits as worked out afterwards, no
second kernel, no memory of its own in a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import native
import pytest
import torch
from checks import generator, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

import dlops.functional as F

parametrize = pytest.mark.parametrize
grad = torch.autograd.grad

REDUCTIONS = ["none", "mean", "sum"]
Loss = Callable[[Tensor], Tensor]


def labels(rows: tuple[int, ...], classes: int) -> Tensor:
    target = torch.randint(classes, rows, generator=generator(1))
    return target.where(torch.arange(target.numel()).reshape(rows) % 5 != 0, -100)


def focal(size: tuple[int, ...], dtype: torch.dtype, reduction: str, **options: Any) -> Loss:
    target = labels((size[0], *size[2:]), size[1])
    weight = normal((size[1],), 2).abs().to(dtype)
    return lambda x: F.focal_loss(x, target, weight, reduction=reduction, **options)


def soft_focal(size: tuple[int, ...], dtype: torch.dtype, reduction: str, **options: Any) -> Loss:
    target = normal(size, 1).softmax(1).to(dtype)
    return lambda x: F.focal_loss(x, target, reduction=reduction, **options)


def sigmoid(size: tuple[int, ...], dtype: torch.dtype, reduction: str, **options: Any) -> Loss:
    target = (normal(size, 1) > 1).to(dtype)
    target[0] = 0.3  # some soft targets
    return lambda x: F.sigmoid_focal_loss(x, target, reduction=reduction, **options)


CASES = {
    "few classes": partial(focal, (37, 10)),
    "few classes, smoothed": partial(focal, (37, 10), label_smoothing=0.1, gamma=0.7),
    "few classes, probabilities": partial(soft_focal, (37, 10)),
    "many classes": partial(focal, (21, 300), gamma=0.0),
    "many classes, smoothed": partial(focal, (21, 300), label_smoothing=0.1),
    "many classes, probabilities": partial(soft_focal, (21, 300), gamma=1.3),
    "image": partial(focal, (3, 30, 5, 7)),
    "sigmoid": partial(sigmoid, (33, 50)),
    "sigmoid, any gamma": partial(sigmoid, (33, 50), gamma=1.3, alpha=-1),
}
SIZES = {name: case.args[0] for name, case in CASES.items()}


def leaf(case: str, dtype: torch.dtype) -> Tensor:
    return (3 * normal(SIZES[case])).to(dtype).requires_grad_()


@pytest.mark.determinism
@parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@parametrize("reduction", REDUCTIONS)
@parametrize("case", CASES)
def test_same_bits_however_backward_is_called(
    case: str, reduction: str, dtype: torch.dtype
) -> None:
    x, loss = leaf(case, dtype), CASES[case](dtype, reduction)
    output = loss(x)
    assert torch.equal(output, loss(x.detach()))
    for factor in (torch.ones_like(output), normal(output.shape, 3).to(dtype)):
        (once,) = grad(loss(x), x, factor)
        output = loss(x)
        (first,) = grad(output, x, factor, retain_graph=True)
        kept = first.clone()
        first.zero_()  # is the caller's own
        (second,) = grad(output, x, factor)
        (differentiable,) = grad(loss(x), x, factor, create_graph=True)
        for other in (kept, second, differentiable):
            assert torch.equal(once, other)


@pytest.mark.compose
@parametrize("reduction", REDUCTIONS)
@parametrize("case", CASES)
def test_many_gradients_at_once(case: str, reduction: str) -> None:
    x, loss = leaf(case, torch.float64), CASES[case](torch.float64, reduction)
    output = loss(x)
    factors = normal((3, *output.shape), 4)
    (together,) = grad(output, x, factors, is_grads_batched=True, retain_graph=True)
    one_by_one = [grad(output, x, factor, retain_graph=True)[0] for factor in factors]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.memory
@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("op", ["focal_loss", "sigmoid_focal_loss"])
def test_kept_but_in_low_precision(op: str, dtype: torch.dtype) -> None:
    """There, a gradient that waits would be rounded twice."""
    case = "many classes" if op == "focal_loss" else "sigmoid"
    output: Any = CASES[case](dtype, "mean")(leaf(case, dtype))
    assert (output.grad_fn.saved_tensors[-1] is not None) == (dtype == torch.float32)


@pytest.mark.compose
@parametrize("mode", ["real", "fake", "symbolic"])
@parametrize("case", ["many classes", "sigmoid"])
def test_recorded_as_value_and_backward(case: str, mode: str) -> None:
    """What records or fakes has no numbers to look at, and the record runs on any device."""
    loss = CASES[case](torch.float32, "mean")

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return grad(loss(x), x)[0]

    x = leaf(case, torch.float32).detach()
    recorded = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    targets = {str(node.target) for node in recorded.graph.nodes}
    assert not any("and_grad" in target for target in targets)
    assert torch.equal(recorded(x), gradient(x))


@pytest.mark.compose
@parametrize("op", ["focal_loss", "sigmoid_focal_loss"])
def test_fake_tensors_have_gradients(op: str) -> None:
    with FakeTensorMode():
        x = torch.empty(5, 30, requires_grad=True)
        target = torch.empty(5, 30) if op == "sigmoid_focal_loss" else torch.arange(5)
        getattr(F, op)(x, target, reduction="mean").backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.compose
@parametrize("case", ["many classes", "sigmoid"])
def test_transform_of_a_backward(case: str) -> None:
    """It is linear in grad_output."""
    x, loss = leaf(case, torch.float64), CASES[case](torch.float64, "none")
    first, second, third = loss(x), loss(x), loss(x)
    factor, tangent = normal(first.shape, 6), normal(first.shape, 7)
    value, forward = torch.func.jvp(lambda f: grad(first, x, f)[0], (factor,), (tangent,))
    torch.testing.assert_close(value, grad(second, x, factor)[0])
    torch.testing.assert_close(forward, grad(third, x, tangent)[0])


@pytest.mark.compose
@parametrize("case", ["many classes", "sigmoid"])
def test_tangent_of_a_gradient(case: str) -> None:
    """Forward over reverse needs no create_graph."""
    loss = CASES[case](torch.float64, "mean")
    x, tangent = leaf(case, torch.float64), normal(SIZES[case], 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        (gradient,) = grad(loss(dual) ** 2, dual)
        forward = forward_ad.unpack_dual(gradient).tangent
    (first,) = grad(loss(x) ** 2, x, create_graph=True)
    (reverse,) = grad(first, x, tangent)
    torch.testing.assert_close(forward, reverse)


@pytest.mark.memory
@parametrize("reduction", REDUCTIONS)
@parametrize("case", ["many classes", "sigmoid"])
def test_its_memory_becomes_the_gradient(case: str, reduction: str) -> None:
    x, loss = leaf(case, torch.float32), CASES[case](torch.float32, reduction)
    for retain in (False, True):
        output: Any = loss(x)
        place = output.grad_fn.saved_tensors[-1].data_ptr()
        (gradient,) = grad(output, x, torch.full_like(output, 2), retain_graph=retain)
        assert (gradient.data_ptr() == place) == (not retain)


@pytest.mark.memory
@parametrize("reduction", REDUCTIONS)
@parametrize("factor", [1, 5])
@parametrize("case", ["many classes", "sigmoid"])
def test_what_a_hook_packed_stays_as_it_was(case: str, factor: int, reduction: str) -> None:
    x, loss = leaf(case, torch.float32), CASES[case](torch.float32, reduction)
    packed: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append((tensor, tensor.clone()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss(x)
    (gradient,) = grad(output, x, torch.full_like(output, factor))
    gradient.zero_()
    for tensor, before in packed:
        assert torch.equal(tensor, before)


@pytest.mark.special
@parametrize("reduction", REDUCTIONS)
@parametrize("factor", [float("inf"), float("nan"), 0.0])
@parametrize("classes", [5, 100])
def test_ignored_rows_take_no_gradient_as_in_native(
    classes: int, factor: float, reduction: str
) -> None:
    target = labels((12,), classes)

    def gradient(loss: Callable[..., Tensor]) -> Tensor:
        x = normal((12, classes)).float().requires_grad_()
        output = loss(x, target, reduction=reduction)
        return grad(output, x, torch.full_like(output, factor))[0]

    ours = gradient(partial(F.focal_loss, gamma=0.0))
    assert (ours[target == -100] == 0).all()
    expected = gradient(cross_entropy)
    assert torch.equal(ours.isfinite(), expected.isfinite())


@pytest.mark.native
def test_a_scaled_and_accumulated_loss() -> None:
    """As a GradScaler and gradient accumulation multiply it."""
    x, target = normal((12, 30)).float(), labels((12,), 30)
    gradients = []
    for loss in (F.focal_loss, native.focal_loss):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            (loss(leaf * 2, target) * 1024 / 2).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
