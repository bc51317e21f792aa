"""The ops in the rest of PyTorch: higher derivatives, transforms, compilers, modes, networks."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import native
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap
from torch.nn.utils import prune

import dlops
from dlops import functional as F

pytestmark = pytest.mark.compose

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


def test_checkpointing() -> None:
    model = dlops.convert(network())
    args = torch.randn(4, 3, 16, 16, requires_grad=True), torch.randint(10, (4,))
    plain = with_gradients(step, model, *args)

    def checkpointed(model: nn.Module, *args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(step, model, *args, use_reentrant=False)

    assert all(map(torch.equal, plain, with_gradients(checkpointed, model, *args)))


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
    close(changed(dlops.convert(network()))(x), changed(network())(x))


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


# ----------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet"])
def test_torchvision_networks(name: str) -> None:
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10, **options)
    model = model.double().eval()
    keys = list(model.state_dict())
    x = double(2, 3, 64, 64)

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = run()
    dlops.convert(model)
    assert list(model.state_dict()) == keys
    assert not any(type(m) in (nn.Conv2d, nn.MaxPool2d) for m in model.modules())
    close(run(), expected)
