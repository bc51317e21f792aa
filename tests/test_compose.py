"""The ops in the rest of PyTorch: higher derivatives, transforms, compilers, modes, networks."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import native
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map

import dlops
from dlops import functional as F

pytestmark = [
    pytest.mark.compose,
    pytest.mark.filterwarnings(
        "ignore:.torch.jit", "ignore:ComplexHalf support", "ignore::torch.jit.TracerWarning"
    ),
]

Function = Callable[..., Tensor]


def double(*size: int, seed: int = 0) -> Tensor:
    return checks.normal(size, seed)


LABELS = torch.tensor([1, 2, -100, 4])
SMOOTH = double(4, 5, seed=3).softmax(1)
HARD = (double(4, 5, seed=4) > 0).double()
CLASS_WEIGHT = double(5, seed=5).abs() + 0.1
CLASS_ALPHA = torch.tensor([0.1, 0.2, 0.3, -1.0, 0.5], dtype=torch.float64)

# name -> (op of dlops, the same op of native, tensors that are differentiated)
PROBLEMS: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 1), 1, 2),
        lambda x, w, b: native.conv2d(x, w, b, (2, 1), (1, 1), 1, 2),
        (double(2, 4, 5, 4), double(6, 2, 3, 2, seed=1), double(6, seed=2)),
    ),
    "conv2d_same": (
        lambda x, w: F.conv2d(x, w, padding="same", dilation=2),
        lambda x, w: native.conv2d(x, w, padding="same", dilation=2),
        (double(1, 2, 5, 4), double(3, 2, 2, 3, seed=1)),
    ),
    "max_pool2d": (
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: native.max_pool2d(x, 3, 2, 1),
        (double(2, 3, 5, 6),),
    ),
    "unfold": (
        lambda x: F.unfold(x, (2, 3), padding=1),
        lambda x: native.unfold(x, (2, 3), padding=1),
        (double(2, 2, 4, 5),),
    ),
    "fold": (
        lambda x: F.fold(x, (4, 5), 2),
        lambda x: native.fold(x, (4, 5), 2),
        (double(2, 8, 12),),
    ),
    "sigmoid_focal_loss": (
        lambda x: F.sigmoid_focal_loss(x, HARD, reduction="mean"),
        lambda x: native.sigmoid_focal_loss(x, HARD, reduction="mean"),
        (double(4, 5),),
    ),
    "sigmoid_focal_loss_soft_targets": (
        lambda x, t: F.sigmoid_focal_loss(x, t.sigmoid(), gamma=1.5),
        lambda x, t: native.sigmoid_focal_loss(x, t.sigmoid(), gamma=1.5),
        (double(4, 5), double(4, 5, seed=1)),
    ),
    "focal_loss": (
        lambda x: F.focal_loss(x, LABELS, CLASS_WEIGHT),
        lambda x: native.focal_loss(x, LABELS, CLASS_WEIGHT),
        (double(4, 5),),
    ),
    "focal_loss_unreduced": (
        lambda x: F.focal_loss(x, LABELS, gamma=0.5, reduction="none"),
        lambda x: native.focal_loss(x, LABELS, gamma=0.5, reduction="none"),
        (double(4, 5),),
    ),
    "focal_loss_probabilities": (
        lambda x, q: F.focal_loss(x, q.softmax(1), CLASS_WEIGHT, label_smoothing=0.1),
        lambda x, q: native.focal_loss(x, q.softmax(1), CLASS_WEIGHT, label_smoothing=0.1),
        (double(4, 5), double(4, 5, seed=1)),
    ),
}

problem = pytest.mark.parametrize(
    ("ours", "theirs", "tensors"), PROBLEMS.values(), ids=PROBLEMS.keys()
)


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------- derivatives


@problem
def test_first_derivatives(ours: Function, theirs: Function, tensors: Any) -> None:
    assert gradcheck(
        ours,
        leaves(tensors),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@problem
def test_second_derivatives(ours: Function, theirs: Function, tensors: Any) -> None:
    assert gradgradcheck(
        ours,
        leaves(tensors),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_complex_convolution(layout: torch.memory_format) -> None:
    def complex_leaf(*size: int, seed: int) -> Tensor:
        value = torch.complex(double(*size, seed=seed), double(*size, seed=seed + 10))
        if len(size) == 4:
            value = value.contiguous(memory_format=layout)
        return value.requires_grad_()

    tensors = (
        complex_leaf(2, 4, 4, 3, seed=0),
        complex_leaf(2, 2, 2, 2, seed=1),
        complex_leaf(2, seed=2),
    )

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, 1, 1, groups=2)

    expected = native.conv2d(*tensors, 1, 1, groups=2)
    close(ours(*tensors), expected)
    covector = torch.complex(double(*expected.shape, seed=3), double(*expected.shape, seed=4))
    close(
        torch.autograd.grad(ours(*tensors), tensors, covector),
        torch.autograd.grad(expected, tensors, covector),
    )
    assert gradcheck(ours, tensors, check_forward_ad=True)
    assert gradgradcheck(ours, tensors, check_fwd_over_rev=True)


def test_half_precision_complex_convolution() -> None:
    x, w = (
        torch.complex(double(*size), double(*size, seed=1)).to(torch.complex32)
        for size in ((2, 4, 6, 5), (6, 2, 3, 3))
    )
    ours, theirs = [], []
    for op, results in ((F.conv2d, ours), (native.conv2d, theirs)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        result = op(*leaves, padding=1, groups=2)
        grads = torch.autograd.grad(torch.view_as_real(result).float().square().sum(), leaves)
        results += [t.to(torch.complex64) for t in (result, *grads)]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_convolution(dtype: torch.dtype) -> None:
    x = torch.randint(0, 3, (2, 3, 5, 6), dtype=dtype)
    w = torch.randint(0, 3, (4, 3, 2, 3), dtype=dtype)
    assert torch.equal(F.conv2d(x, w, padding=1), native.conv2d(x, w, padding=1))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("alpha", [-1.0, 0.25, CLASS_ALPHA], ids=["off", "scalar", "per_class"])
def test_sigmoid_second_derivatives(gamma: float, alpha: Any) -> None:
    (x,) = leaves((double(4, 5),))
    assert gradgradcheck(
        lambda x: F.sigmoid_focal_loss(x, HARD, alpha, gamma), (x,), check_fwd_over_rev=True
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [LABELS, SMOOTH], ids=["indices", "probabilities"])
def test_softmax_second_derivatives(gamma: float, smoothing: float, target: Tensor) -> None:
    (x,) = leaves((double(4, 5),))
    assert gradgradcheck(
        lambda x: F.focal_loss(x, target, CLASS_WEIGHT, gamma, label_smoothing=smoothing),
        (x,),
        check_fwd_over_rev=True,
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_second_derivatives_stay_finite(gamma: float) -> None:
    logits = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], dtype=torch.float32)
    for target in (0.0, 1.0):
        second = vmap(grad(grad(lambda x, t=target: F.sigmoid_focal_loss(x, x * 0 + t, -1, gamma))))
        assert second(logits).isfinite().all()
    rows = torch.stack([logits, -logits], 1)
    for label in (0, 1):
        second = vmap(hessian(lambda x, t=label: F.focal_loss(x, torch.tensor(t), gamma=gamma)))
        assert second(rows).isfinite().all()


def test_a_third_derivative_of_convolution_is_right() -> None:
    x, w = double(1, 1, 3, 3), double(1, 1, 2, 2, seed=1)

    def cube(conv: Function) -> Tensor:
        return grad(lambda x: hessian(lambda x: conv(x, w).pow(3).sum())(x).sum())(x)

    close(cube(F.conv2d), cube(native.conv2d))


def test_a_third_derivative_of_a_loss_is_refused() -> None:
    (x,) = leaves((double(4, 5),))
    (first,) = torch.autograd.grad(F.focal_loss(x, LABELS), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="focal_loss has derivatives up to the second"):
        torch.autograd.grad(second.sum(), x)


# ---------------------------------------------------------------------------------- torch.func


@problem
def test_func_transforms(ours: Function, theirs: Function, tensors: Any) -> None:
    def results(op: Function) -> Any:
        tangents = tuple(double(*t.shape, seed=9 + i) for i, t in enumerate(tensors))
        value, pull = vjp(op, *tensors)
        numbers = tuple(range(len(tensors)))
        total = lambda *args: op(*args).sin().sum()  # noqa: E731
        return (
            value,
            pull(torch.ones_like(value)),
            jvp(op, tensors, tangents),
            jacfwd(op, numbers)(*tensors),
            hessian(total, numbers)(*tensors),
        )

    close(results(ours), results(theirs))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_of_convolution(in_dims: Any, groups: int) -> None:
    sizes = [(2, 4, 5, 5), (6, 4 // groups, 3, 3)]
    x, w = (
        double(*size, seed=i) if dim is None else double(3, *size, seed=i).movedim(0, dim)
        for i, (size, dim) in enumerate(zip(sizes, in_dims, strict=True))
    )

    def derivatives(conv: Function) -> Any:
        def one(x: Tensor, w: Tensor) -> Any:
            call = lambda x, w: conv(x, w, None, 1, 1, 1, groups)  # noqa: E731
            return call(x, w), grad(lambda x, w: call(x, w).pow(2).sum(), (0, 1))(x, w)

        return vmap(one, in_dims)(x, w)

    close(derivatives(F.conv2d), derivatives(native.conv2d))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", [LABELS, SMOOTH], ids=["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_vmap_over_class_weights(reduction: str, target: Tensor, smoothing: float) -> None:
    """Values, and all derivatives that flow through the rules for a weight of each sample."""
    weights = double(3, 5, seed=7).abs() + 0.1
    x, along = double(4, 5), double(4, 5, seed=8)

    def derivatives(loss: Function, x: Tensor, w: Tensor) -> Any:
        def one(x: Tensor, t: Tensor) -> Tensor:
            value = loss(x, t, w, 2.0, reduction=reduction, label_smoothing=smoothing)
            return value.sin().sum()

        soft = target.is_floating_point()
        numbers = (0, 1) if soft else 0
        first = grad(one, numbers)(x, target)
        tangents = (along, along.roll(1, 0) if soft else torch.zeros_like(target))
        second = hessian(one, numbers)(x, target)
        forward = jvp(lambda x, t: one(x, t), (x, target), tangents) if soft else ()
        return one(x, target), first, second, forward

    ours = vmap(lambda w: derivatives(F.focal_loss, x, w))(weights)
    one_by_one = [derivatives(native.focal_loss, x, w) for w in weights]
    for i, expected in enumerate(one_by_one):
        close(tree_map(lambda t, i=i: t[i], ours), expected)


def test_derivatives_of_class_weights() -> None:
    """As native's cross entropy has them: where the target holds class probabilities."""
    x, w = double(4, 5), CLASS_WEIGHT

    def total(loss: Function, gamma: float) -> Function:
        return lambda x, w: loss(x, SMOOTH, w, gamma, label_smoothing=0.1).exp()

    ours, theirs = total(F.focal_loss, 2.0), total(native.focal_loss, 2.0)
    close(hessian(ours, (0, 1))(x, w), hessian(theirs, (0, 1))(x, w))
    close(jvp(ours, (x, w), (x, w)), jvp(theirs, (x, w), (x, w)))
    with pytest.raises(RuntimeError, match="no derivative with respect to weight"):
        F.focal_loss(x, LABELS, w.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no derivative with respect to weight"):
        jvp(lambda w: F.focal_loss(x, LABELS, w), (w,), (w,))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_derivatives_of_alpha(reduction: str) -> None:
    x = double(4, 5)

    def loss(alpha: Tensor, x: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(x, HARD, alpha, 1.5, reduction)

    def plain(alpha: Tensor, x: Tensor) -> Tensor:
        losses = F.sigmoid_focal_loss(x, HARD, -1.0, 1.5)
        weights = HARD * alpha + (1 - HARD) * (1 - alpha)
        weighted = losses * torch.where(alpha < 0, 1.0, weights)
        return {"none": weighted, "mean": weighted.mean(), "sum": weighted.sum()}[reduction]

    for alpha in (CLASS_ALPHA, torch.tensor(0.3, dtype=torch.float64)):
        close(loss(alpha, x), plain(alpha, x))
        close(jacfwd(loss, (0, 1))(alpha, x), jacfwd(plain, (0, 1))(alpha, x))
        assert gradcheck(loss, (alpha.clone().requires_grad_(), x.clone().requires_grad_()))
    close(vmap(loss, (0, None))(double(3, 5).abs(), x)[1], loss(double(3, 5).abs()[1], x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_vmap_of_losses(reduction: str) -> None:
    x, labels = double(3, 4, 5), torch.stack([LABELS, LABELS.flip(0), LABELS.roll(1)])

    def derivatives(loss: Function, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        total = lambda x: loss(x, t, CLASS_WEIGHT, 2.0, reduction=reduction).sum()  # noqa: E731
        return grad(total)(x), hessian(total)(x)

    ours = vmap(lambda x, t: derivatives(F.focal_loss, x, t))(x, labels)
    # The native formula cannot be mapped over its labels.
    one_by_one = [derivatives(native.focal_loss, *sample) for sample in zip(x, labels, strict=True)]
    close(ours, tuple(torch.stack(part) for part in zip(*one_by_one, strict=True)))


def test_gradients_for_each_sample() -> None:
    model = network().double()
    images, labels = double(6, 3, 16, 16), torch.arange(6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters: Any, image: Tensor, label: Tensor) -> Tensor:
        return F.focal_loss(functional_call(model, parameters, (image[None],)), label[None])

    dlops.convert(model)
    ours = vmap(grad(one), in_dims=(None, 0, 0))(parameters, images, labels)
    dlops.revert(model)
    expected = vmap(grad(one), in_dims=(None, 0, 0))(parameters, images, labels)
    close(ours, expected)


# ----------------------------------------------------------------------------------- compilers


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding="same", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
    )


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    one_hot = nn.functional.one_hot(labels, 10).to(logits.dtype)
    return F.focal_loss(logits, labels) + F.sigmoid_focal_loss(logits, one_hot, reduction="mean")


def with_gradients(function: Function, model: nn.Module, *args: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = function(model, *args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="Inductor's own code for one_hot does not compile with ATEN_CPU_CAPABILITY=default",
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's cache does not tell one ATEN_CPU_CAPABILITY from another: code made for 16 lanes
    # would run with 8 and leave half of its output unwritten.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = dlops.convert(network())
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for batch in (4, 5):
        args = torch.randn(batch, 3, 16, 16), torch.randint(10, (batch,))
        torch.testing.assert_close(
            with_gradients(compiled, model, *args), with_gradients(step, model, *args)
        )


@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="Inductor's own code does not compile with ATEN_CPU_CAPABILITY=default",
)
@pytest.mark.parametrize("op", ["focal_loss", "sigmoid_focal_loss"])
def test_compile_losses_of_turned_logits(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' results are dense, whatever the logits' strides are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    target = torch.arange(7) % 5 if op == "focal_loss" else (torch.arange(35) % 2.0).view(7, 5)

    def loss(x: Tensor) -> Tensor:
        return getattr(F, op)(x.t(), target, reduction="none").sin().sum()

    x = torch.randn(5, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    (ours,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(ours, expected)


def test_export() -> None:
    model = dlops.convert(network()).eval()
    x = torch.randn(4, 3, 16, 16)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    assert "torch.ops.dlops.conv2d" in program.graph_module.code
    bigger = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(bigger), model(bigger))
    torch.testing.assert_close(program.run_decompositions().module()(bigger), model(bigger))


def test_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted network as a compiled package, loaded without its Python code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = dlops.convert(network()).eval()
    x = torch.randn(4, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "network.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (4, 3):
        images = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(loaded(images), model(images))


def test_raw_operators_compile() -> None:
    """Called as torch.ops.dlops.*, with the derivatives that are registered on them."""
    ops = torch.ops.dlops
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False)

    def raw(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        y = ops.conv2d(x, w, None, [1, 1], [1, 1, 1, 1], [1, 1], 1)
        columns = ops.unfold(y, [2, 2], [1, 1], [0, 0], [2, 2])
        y = ops.fold(columns, [8, 8], [2, 2], [1, 1], [0, 0], [2, 2])
        pooled = ops.max_pool2d(y, *window)[0] + ops.max_pool2d_values(y, *window)
        logits = pooled.mean((2, 3))
        losses = ops.sigmoid_focal_loss(logits, logits.detach().sigmoid(), None, 0.25, 2.0, 1)
        return losses + ops.focal_loss(logits, labels, None, 2.0, -100, 1, 0.1)[0]

    args = double(2, 3, 8, 8), double(5, 3, 3, 3, seed=1), torch.tensor([1, 4])
    compiled = torch.compile(raw, fullgraph=True, backend="aot_eager")
    for function in (raw, compiled):
        leaves = args[0].clone().requires_grad_(), args[1].clone().requires_grad_()
        result = function(*leaves, args[2])
        grads = torch.autograd.grad(result, leaves)
        if function is raw:
            expected = [result, *grads]
        else:
            close([result, *grads], expected)


def test_jit_trace_is_saved_and_loaded() -> None:
    model = dlops.convert(network()).eval()
    x = torch.randn(2, 3, 16, 16)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), model(x))


def test_symbolic_trace() -> None:
    model = dlops.convert(network())
    traced = torch.fx.symbolic_trace(model)
    assert F.conv2d in {node.target for node in traced.graph.nodes}
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(traced(x), model(x))


def test_meta_device() -> None:
    model = dlops.convert(network()).to("meta")
    out = model(torch.empty(2, 3, 16, 16, device="meta"))
    assert out.shape == (2, 10)
    assert out.is_meta


# --------------------------------------------------------------------------------------- modes


def test_autocast_casts_as_native() -> None:
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    native_model, ours = network(), dlops.convert(network())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = native_model(x), ours(x)
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert ours[0](x).dtype == native_model[0](x).dtype
        loss, expected = F.focal_loss(mine, labels), native.cross_entropy(mine, labels)
        assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model = dlops.convert(network())
    x = torch.randn(2, 3, 16, 16)
    expected = model(x).detach()
    with mode():
        out = model(x)
    assert not out.requires_grad
    assert torch.equal(out, expected)


def test_only_the_gradients_that_are_needed() -> None:
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.profiler.profile() as profile:
        F.conv2d(x, w).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "dlops::conv2d_grad_weight" in names
    assert "dlops::conv2d_grad_input" not in names


def test_gradients_at_once_are_those_that_can_be_differentiated() -> None:
    """Backward runs one op for all gradients; with create_graph, an op for each."""
    x, w, b = (torch.randn(size, requires_grad=True) for size in ((2, 3, 8, 8), (4, 3, 3, 3), (4,)))
    out = F.conv2d(x, w, b)
    grad_output = torch.randn_like(out)

    def gradients(create_graph: bool) -> tuple[set[str], tuple[Tensor, ...]]:
        with torch.profiler.profile() as profile:
            grads = torch.autograd.grad(
                out, (x, w, b), grad_output, retain_graph=True, create_graph=create_graph
            )
        return {event.key for event in profile.key_averages()}, grads

    (names, at_once), (one_by_one, kept) = gradients(False), gradients(True)
    assert "dlops::conv2d_backward" in names
    assert "dlops::conv2d_backward" not in one_by_one
    assert all(map(torch.equal, at_once, kept))
    assert all(grad.requires_grad for grad in kept[:2])


def test_checkpointing() -> None:
    model = dlops.convert(network())
    args = torch.randn(4, 3, 16, 16, requires_grad=True), torch.randint(10, (4,))
    plain = with_gradients(step, model, *args)

    def checkpointed(model: nn.Module, *args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(step, model, *args, use_reentrant=False)

    assert all(map(torch.equal, plain, with_gradients(checkpointed, model, *args)))


def test_hooks() -> None:
    """Hooks on modules, tensors, parameters and saved tensors see what native's see."""

    def seen(model: nn.Module) -> tuple[list[str], list[Tensor]]:
        names: list[str] = []
        tensors: list[Tensor] = []
        model[0].register_forward_pre_hook(lambda m, args: names.append("before"))
        model[0].register_forward_hook(lambda m, args, out: tensors.append(out.detach()))
        model[2].register_full_backward_hook(lambda m, gi, go: tensors.extend([*gi, *go]))
        model[0].weight.register_hook(lambda g: g * 2)
        model[0].weight.register_post_accumulate_grad_hook(lambda p: tensors.append(p.grad.clone()))
        x = double(2, 3, 16, 16).requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            out = model(x)
        out.register_hook(lambda g: tensors.append(g))
        out.sum().backward()
        return names, [*tensors, x.grad]

    ours, theirs = seen(dlops.convert(network().double())), seen(network().double())
    assert ours[0] == theirs[0] == ["before"]
    close(ours[1], theirs[1])


def test_copies_and_files() -> None:
    model = dlops.convert(network())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = network()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(dlops.convert(other)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "prune"])
def test_changed_parameters(change: str) -> None:
    def changed(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        if change == "prune":
            prune.l1_unstructured(model[0], "weight", 0.5)
        else:
            getattr(nn.utils.parametrizations, change)(model[0])
        return model.double().eval()

    x = double(2, 3, 16, 16)
    theirs = changed(network())
    close(changed(dlops.convert(network()))(x), theirs(x))
    # Changed first, converted then.
    ours = dlops.convert(changed(network()))
    assert isinstance(ours[0], dlops.nn.Conv2d)
    close(ours(x), theirs(x))
    assert not isinstance(dlops.revert(ours)[0], dlops.nn.Conv2d)
    if change != "prune":
        parametrize.remove_parametrizations(dlops.convert(ours)[0], "weight")
        assert type(ours[0]) is dlops.nn.Conv2d
        close(ours(x), theirs(x))


def test_tensor_subclasses_are_asked() -> None:
    class Counted(Tensor):
        calls: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.calls.append(getattr(function, "__qualname__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1, 3, 8, 8).as_subclass(Counted)
    out = F.max_pool2d(F.conv2d(x, torch.randn(4, 3, 3, 3)), 2)
    assert isinstance(out, Counted)
    assert {"conv2d", "max_pool2d"} <= set(Counted.calls)
