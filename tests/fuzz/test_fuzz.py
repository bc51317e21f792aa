"""Generated calls, valid and invalid: each agrees with native or is refused as native refuses it.

    DLOPS_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz

runs more examples of each op than the 500 of the default suite, and others in every run. 500 and
fewer, as the default suite and the sanitizers run, are the same in all: a suite must not depend on
luck, and now and then native's convolution crashes in oneDNN and takes the suite along. A failure
prints the call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import native
import pytest
import torch
from checks import normal
from hypothesis import HealthCheck, assume, event, given, settings
from known import BEFOREHAND, EXTENSIONS, NATIVE_FAULTS, OTHER_TYPES, REFUSALS, elements, shape_only
from strategies import CALLS, Call
from tolerances import TOLERANCES, assert_accurate
from torch import Tensor

import dlops

pytestmark = pytest.mark.fuzz

DEFAULT_EXAMPLES = 500
EXAMPLES = int(os.environ.get("DLOPS_FUZZ_EXAMPLES", DEFAULT_EXAMPLES))

OURS = SimpleNamespace(functional=dlops.functional, nn=dlops.nn)
NATIVE = SimpleNamespace(functional=native, nn=torch.nn)
MODULES = {"conv2d": "Conv2d", "max_pool2d": "MaxPool2d", "unfold": "Unfold", "fold": "Fold"}
# What native's errors say where it cannot do what it takes.
ONEDNN_FAILS = "could not create a primitive"
NATIVE_GIVES_UP = ("allocate memory", "slow_conv2d: grad_weight must be contiguous", ONEDNN_FAILS)
# Tensors that have no gradient in ours.
UNDIFFERENTIABLE = {"focal_loss": ("weight",)}
LOSSES = ("sigmoid_focal_loss", "focal_loss")


def perform(side: Any, op: str, call: Call, tensors: dict[str, Tensor | None]) -> Any:
    """The call on dlops' or native's side, through a function or a module."""
    arguments = dict(call.arguments)
    if op == "focal_loss" and side is NATIVE:
        gamma = arguments.pop("gamma")
        if gamma == 0:
            return native.cross_entropy(**tensors, **arguments)  # type: ignore[arg-type]
        native.cross_entropy(**tensors, **arguments)  # type: ignore[arg-type]  # refuses alike
        logits, target = tensors["input"], tensors["target"]
        assert logits is not None
        assert target is not None
        if not target.is_floating_point():  # what cross_entropy does with it
            target = target.long().squeeze(0) if logits.dim() == 1 else target.long()
            tensors = {**tensors, "target": target}
        # Native reads a negative smoothing as none.
        arguments["label_smoothing"] = max(arguments["label_smoothing"], 0.0)
        return native.focal_loss(**tensors, **arguments, gamma=gamma)  # type: ignore[arg-type]
    if op in MODULES and call.module:
        if op == "conv2d":
            return convolution_module(side, tensors, arguments)
        return getattr(side.nn, MODULES[op])(**arguments)(tensors["input"])
    return getattr(side.functional, op)(**tensors, **arguments)


def convolution_module(side: Any, tensors: dict[str, Any], arguments: dict[str, Any]) -> Tensor:
    input, weight, bias = tensors["input"], tensors["weight"], tensors["bias"]
    if weight.dim() != 4 or weight.numel() > 2**20 or not isinstance(arguments["groups"], int):
        return side.functional.conv2d(**tensors, **arguments)
    outputs, channels, *kernel = weight.shape
    module = side.nn.Conv2d(
        channels * arguments["groups"],
        outputs,
        tuple(kernel),
        **arguments,
        bias=bias is not None,
        device="meta",
    )
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return torch.func.functional_call(module, parameters, (input,))


def outcome(
    side: Any,
    op: str,
    call: Call,
    prepare: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    prepare_grad: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> dict[str, Tensor] | Exception:
    """Values and gradients, or what was raised."""
    tensors = {name: t if t is None else prepare(t) for name, t in call.tensors().items()}
    wanted = {}
    for name, t in tensors.items():
        differentiable = t is not None and (t.is_floating_point() or t.is_complex())
        if differentiable and name not in UNDIFFERENTIABLE.get(op, ()):
            wanted[name] = t.requires_grad_() if t.is_leaf else t
    try:
        result = perform(side, op, call, tensors)
        results = {}
        if isinstance(result, tuple):
            result, results["indices"] = result
        results["value"] = result.detach()
        if wanted and result.requires_grad and not result.is_meta:
            grad_output = prepare_grad(normal(result.shape, 99).to(rounding(call)).to(result))
            gradients = torch.autograd.grad(
                result, list(wanted.values()), grad_output, allow_unused=True
            )
            named = zip(wanted, gradients, strict=True)
            results |= {f"gradient of {name}": g for name, g in named if g is not None}
        return results
    except Exception as error:
        return error


def native_outcome(op: str, call: Call) -> dict[str, Tensor] | Exception:
    """An error in oneDNN's code generator stays with the thread, and fails every later convolution
    there: a new thread knows whether this one is to blame."""
    result = outcome(NATIVE, op, call)
    if ONEDNN_FAILS in str(result):
        with ThreadPoolExecutor(1) as fresh:
            result = fresh.submit(outcome, NATIVE, op, call).result()
    return result


def rounding(call: Call) -> torch.dtype:
    """What the output's gradient is rounded to, the same for every side."""
    dtypes = [spec.dtype for spec in call.specs.values() if spec is not None]
    low = [dtype for dtype in dtypes if dtype in TOLERANCES]
    return min(low, key=lambda dtype: dtype.itemsize, default=torch.float64)


def in_double(x: Tensor) -> Tensor:
    """In plain memory: native's float64 weight gradient of grouped convolution is wrong for images
    with strides of their own (2.15: (1, 1, 4) of shape (4, 1, 5)), where its float32 is right."""
    if x.is_complex():
        return x.to(torch.complex128).contiguous()
    return x.double().contiguous() if x.is_floating_point() else x


def magnitudes(op: str, call: Call) -> dict[str, float]:
    """What the sums of each result are made of: the same call on absolute values."""
    if op in LOSSES:
        return terms_of_losses(op, call)
    prepare = absolute_as_multiplied if op == "conv2d" else absolute
    results = outcome(NATIVE, op, call, prepare, torch.Tensor.abs)
    assert isinstance(results, dict), repr(results)
    return {name: largest(x) for name, x in results.items() if x.dtype == torch.float64}


def terms_of_losses(op: str, call: Call) -> dict[str, float]:
    tensors, reduction = call.tensors(), call.arguments["reduction"]
    logits = tensors["input" if op == "focal_loss" else "inputs"]
    assert logits is not None
    # Gradients of the output are below 4, and those of a row are weight * (share - softmax).
    terms = {"gradient": 4.0}
    if op == "sigmoid_focal_loss":
        # The formula adds logits that ours does not.
        terms["value"] = terms["gradient of targets"] = 4 * largest(logits) + 1
    target = tensors.get("target")
    rows = logits.numel()
    if target is not None:
        rows = target.numel()
        if target.is_floating_point():
            terms["gradient"] *= largest(target) + max(call.arguments["label_smoothing"], 0.0)
    terms["gradient of input"] = terms["gradient of inputs"] = terms.pop("gradient")
    return {name: t / max(1, rows) if reduction == "mean" else t for name, t in terms.items()}


def largest(x: Tensor) -> float:
    finite = x.double().abs().nan_to_num(0, 0, 0)
    return finite.max().item() if x.numel() else 0.0


def is_cross_entropy(op: str, call: Call) -> bool:
    """Then native is an op, not a formula. Of infinite logits ours makes more: 0 times infinity is
    nothing where a weight or a share is 0."""
    logits = call.tensors().get("input")
    infinite = logits is not None and bool(logits.isinf().any())
    return op == "focal_loss" and call.arguments["gamma"] == 0 and not infinite


def absolute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else in_double(x).abs()


def absolute_as_multiplied(x: Tensor) -> Tensor:
    """CPUs' products of bfloat16 take denormal numbers as zero, in native's kernels, too: such a
    number counts as one that may be wrong by the smallest normal one."""
    size = absolute(x)
    if x.dtype != torch.bfloat16:
        return size
    least = torch.finfo(x.dtype).smallest_normal / TOLERANCES[x.dtype].slack
    return torch.where(size > 0, size.clamp(min=least), size)


def has_denormal(x: Tensor) -> bool:
    """Of bfloat16."""
    if x.dtype != torch.bfloat16:
        return False
    return bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).any())


def check_agrees(ours: dict[str, Tensor], theirs: dict[str, Tensor], op: str, call: Call) -> None:
    if shape_only(op, call):
        return check_metadata(ours, theirs)
    truth = outcome(NATIVE, op, call, in_double)
    assert isinstance(truth, dict), repr(truth)
    assert ours.keys() <= theirs.keys(), f"{list(ours)}, native {list(theirs)}"
    scale = magnitudes(op, call)
    nan = any(t is not None and bool(t.isnan().any()) for t in call.tensors().values())
    denormal = any(t is not None and has_denormal(t) for t in call.tensors().values())
    formula = op in LOSSES and not is_cross_entropy(op, call)
    for name, result in ours.items():
        expected = theirs[name]
        if not (result.is_floating_point() or result.is_complex()):
            assert torch.equal(result.to(expected.dtype), expected), f"{name} differs"
            continue
        assert result.dtype == expected.dtype, f"{name}: {result.dtype}, native {expected.dtype}"
        measured = truth[name]
        if formula and nan:  # ours is NaN in every derivative then
            measured = measured.masked_fill(result.isnan(), float("nan"))
        if op == "conv2d" and call.arguments["padding"] not in (0, (0, 0), "valid"):
            # Infinity times padding is NaN, or is left out: native's own kernels differ.
            left_out = measured.isnan() & ~result.isnan()
            measured = torch.where(left_out, in_double(result), measured)
        if op == "conv2d" and denormal:
            # Infinity times a number that is taken as zero (absolute_as_multiplied).
            as_zero = measured.isinf() & result.isnan() & expected.isnan()
            measured = measured.masked_fill(as_zero, float("nan"))
        if op == "sigmoid_focal_loss" and name == "gradient of targets":
            known = known_powers(call)
            result, expected, measured = result[known], expected[known], measured[known]
        check_accurate(result, expected, measured, name, scale.get(name, 0.0), formula)
    return None


def known_powers(call: Call) -> Tensor:
    """Where the formula in float64 can measure float64: it knows a small 1 - p_t and its roots to
    some of their digits only."""
    tensors = call.tensors()
    logits, targets = tensors["inputs"], tensors["targets"]
    assert logits is not None
    assert targets is not None
    if rounding(call) != torch.float64 or not 0 < call.arguments["gamma"] < 1:
        return torch.ones(targets.shape, dtype=torch.bool)
    p, t = logits.double().sigmoid(), targets.double()
    return ~(p * (1 - t) + (1 - p) * t < 0.01)


def check_metadata(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        result = ours[name]
        assert result.dtype == expected.dtype, f"{name}: {result.dtype}, native {expected.dtype}"
        assert result.shape == expected.shape, f"{name}: {result.shape}, native {expected.shape}"


def check_accurate(
    ours: Tensor, native: Tensor, truth: Tensor, name: str, magnitude: float, formula: bool
) -> None:
    """`formula`: the truth is a formula in native operators, which breaks down here and there."""
    if ours.is_complex():
        ours, native, truth = (torch.view_as_real(x.resolve_conj()) for x in (ours, native, truth))
    truth = truth.double()
    # No measure is what the dtype cannot hold, or comes out of a formula that broke down.
    unmeasured = (truth.abs() > torch.finfo(ours.dtype).max) & truth.isfinite()
    if formula:
        unmeasured |= ~truth.isfinite()
    ours, native, truth = (x.masked_fill(unmeasured, 0) for x in (ours, native, truth))
    same_kind = (native.isnan() & truth.isnan()) | (native.isinf() & native.double().eq(truth))
    kept = (native.isfinite() & truth.isfinite()) | same_kind
    native = torch.where(kept, native, truth.to(native))
    assert_accurate(ours, native, truth, name, magnitude)


def described(call: Call) -> str:
    specs = "\n".join(f"  {name}: {spec}" for name, spec in call.specs.items())
    return f"{call.arguments}{' (module)' if call.module else ''}\n{specs}"


def check(op: str, call: Call) -> None:
    # Sizes that would fit in memory are left to the tests of large tensors.
    assume(not 2**20 < elements(op, call) < 2**44)
    shapes = [spec.shape for spec in call.specs.values() if spec is not None]
    assume(all(math.prod(max(1, size) for size in shape) < 2**62 for shape in shapes))
    ours = outcome(OURS, op, call)
    fault = next((fault for fault in NATIVE_FAULTS if fault.applies(op, call)), None)
    if fault is not None:
        event(f"not compared: {fault.reason}")
        check_sane(ours)
        assert isinstance(ours, Exception) or not fault.refused, ours
        return
    for known in BEFOREHAND:
        if known.applies(op, call):
            call = known.instead(call)
    theirs = native_outcome(op, call)
    for known in EXTENSIONS:
        if isinstance(theirs, Exception) and known.applies(op, call):
            event(f"compared with another call: {known.reason}")
            call = known.instead(call)
            theirs = native_outcome(op, call)
    if isinstance(ours, Exception):
        allowed = REFUSALS if isinstance(theirs, dict) else OTHER_TYPES
        excused = any(known.applies(op, call) for known in allowed)
        excused = excused or (isinstance(theirs, Exception) and "allocate memory" in str(ours))
        assert excused or isinstance(ours, kind(theirs)), f"native: {theirs!r}\nours: {ours!r}"
        event("refused")
        return
    if shape_only(op, call) and isinstance(theirs, NotImplementedError):
        return  # A dtype without a kernel is no matter on the meta device.
    given_up = next((text for text in NATIVE_GIVES_UP if text in str(theirs)), None)
    if given_up:
        event(f"not compared: native gives up: {given_up}")
        check_sane(ours)
        return
    assert isinstance(theirs, dict), f"native: {theirs!r}\nours: {ours}"
    event("agrees")
    check_agrees(ours, theirs, op, call)


def kind(theirs: dict[str, Tensor] | Exception) -> type[Exception] | tuple[()]:
    """What ours may raise where native did that."""
    if isinstance(theirs, dict):
        return ()
    if "allocate memory" in str(theirs):  # ours looks at the other arguments first
        return Exception
    # Where two arguments are bad, ours may name the other one first.
    return RuntimeError if isinstance(theirs, NotImplementedError) else type(theirs)


def check_sane(result: dict[str, Tensor] | Exception) -> None:
    if isinstance(result, Exception):
        assert isinstance(result, (RuntimeError, ValueError, TypeError, IndexError)), repr(result)
    else:
        assert math.prod(result["value"].shape) < 2**44


@pytest.mark.parametrize("op", CALLS)
def test_agrees_or_refuses_as_native(op: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES <= DEFAULT_EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=CALLS[op])
    def fuzz(call: Call) -> None:
        try:
            check(op, call)
        except AssertionError as error:
            raise AssertionError(f"{op} {described(call)}\n{error}") from error

    fuzz()
