"""dlops.functional.conv2d: values, gradients, layouts, determinism and laws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import native
import process
import pytest
import torch
from cases import (
    CONV2D,
    LARGE_CONV2D,
    LAYOUTS,
    SMALL_CONV2D,
    Conv2dCase,
    channels_last,
    ids,
    sliced,
)
from checks import (
    cast,
    check_against_native,
    check_exact,
    check_gradients,
    check_runs_ours,
    check_same_bits,
    check_same_layout,
    normal,
    small_integers,
    threads,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DTYPES, assert_accurate, comparable
from torch import Tensor
from torch._prims_common import suggest_memory_format

import dlops.functional as F
from dlops import reference

parametrize = pytest.mark.parametrize


def both(case: Conv2dCase) -> tuple[Any, Any]:
    """Our convolution and native's, with the case's arguments."""
    return partial(F.conv2d, **case.arguments()), partial(native.conv2d, **case.arguments())


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", CONV2D, ids=ids)
def test_native(case: Conv2dCase, dtype: torch.dtype) -> None:
    check_against_native(*both(case), case.tensors(), dtype)


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", CONV2D, ids=ids)
def test_exact_on_small_integers(case: Conv2dCase, dtype: torch.dtype) -> None:
    check_exact(*both(case), case.tensors(small_integers), dtype)


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("size, padding, dilation", [(32, 6, 6), (32, 20, 20), (64, 0, 20)], ids=str)
def test_dilations_wider_than_a_strip_of_rows(
    size: int, padding: int, dilation: int, layout: str, dtype: torch.dtype
) -> None:
    """A large image is cut into strips of a few rows, which some of the taps miss altogether."""
    case = Conv2dCase(
        "wide", (1, 64, size, size), (64, 64, 3, 3), padding=padding, dilation=dilation
    )
    image, *others = case.tensors(small_integers)
    for _ in range(4):  # two threads that write to the same rows do not always meet
        check_exact(*both(case), [LAYOUTS[layout](image), *others], dtype)


@pytest.mark.exact
@parametrize("channels, groups", [(8, 8), (8, 2), (2, 1), (16, 1)], ids=str)
@parametrize("layout", ["contiguous", "channels_last"])
def test_bias_far_above_its_terms(layout: str, channels: int, groups: int) -> None:
    """Terms are rounded at the size of their own sum, a kernel row's at least, and not of the
    bias: added to it one by one, each of these would vanish."""
    bias, term = 2.0**24, 0.5
    image = LAYOUTS[layout](torch.full((2, channels, 9, 9), term))
    weight = torch.ones(8, channels // groups, 5, 5)
    output = F.conv2d(image, weight, torch.full((8,), bias), groups=groups)
    exact = bias + weight[0].numel() * term
    half_a_unit, kernel_rows = 1, 5
    assert (output.double() - exact).abs().max() <= half_a_unit * kernel_rows


@pytest.mark.special
@parametrize("channels", [2, 9])
@parametrize("layout", ["contiguous", "channels_last"])
def test_strides_far_past_the_image(layout: str, channels: int) -> None:
    """However far the windows beside the image lie, the one that meets it gives the same; native
    allocates all that lies between."""
    image = LAYOUTS[layout](normal((1, channels, 5, 5), 1).float())
    weight = normal((3, channels, 2, 2), 2).float()

    def results(step: int) -> dict[str, Tensor]:
        conv = partial(F.conv2d, stride=step, padding=step)
        return values_and_gradients(lambda x, w: conv(x, w), [image, weight])

    near = results(8)
    for step in (2**20, 2**31, 2**40):
        for name, result in results(step).items():
            torch.testing.assert_close(result, near[name], msg=f"{name}, stride {step}")


AFTER_NATIVE_FAILS = """
import torch
import dlops.functional as F

def tensors(*sizes):
    return [torch.ones(size).contiguous(memory_format=torch.channels_last) for size in sizes]

def native(stride):
    image, weight = (x.requires_grad_() for x in tensors((1, 9, 7, 2), (3, 3, 3, 4)))
    output = torch.nn.functional.conv2d(image, weight, None, stride, (2, 3), 1, 3)
    torch.autograd.grad(output.sum(), [image, weight])

for stride in (1_000_000, 1):
    try:
        native(stride)
    except RuntimeError as error:
        print(error)
print(F.conv2d(*tensors((2, 16, 9, 9), (16, 16, 3, 3))).sum().item())
"""


@pytest.mark.special
def test_works_after_native_cannot(tmp_path: Path) -> None:
    """No kernel of ours is made at run time: what leaves oneDNN's code generator in error (native's
    gradient for such a stride does in torch 2.15) leaves dlops as it was."""
    result = process.run("-c", AFTER_NATIVE_FAILS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(2 * 16 * 49 * 16 * 9.0)


@pytest.mark.gradcheck
@parametrize("case", SMALL_CONV2D, ids=ids)
def test_gradcheck(case: Conv2dCase) -> None:
    check_gradients(both(case)[0], case.tensors())


@pytest.mark.gradcheck
@parametrize("layout", [sliced, channels_last], ids=["sliced", "channels_last"])
@parametrize("case", [case for case in SMALL_CONV2D if case.id in ("3x3", "grouped")], ids=ids)
def test_gradcheck_strided(case: Conv2dCase, layout: Any) -> None:
    input, weight, bias = case.tensors()
    check_gradients(both(case)[0], [layout(input), layout(weight), bias])


@pytest.mark.oracle
@parametrize("case", [case for case in SMALL_CONV2D if len(case.input) == 4], ids=ids)
def test_oracle(case: Conv2dCase) -> None:
    tensors = case.tensors()
    ours = values_and_gradients(both(case)[0], tensors)
    arrays: list[Any] = [None if x is None else x.numpy() for x in tensors]
    value = reference.conv2d(*arrays, **case.arguments())
    grad_output = normal(value.shape, 99).numpy()
    truth = reference.conv2d_backward(grad_output, *arrays[:2], **case.arguments())
    for result, oracle in zip(ours.values(), (value, *truth), strict=False):  # perhaps no bias
        torch.testing.assert_close(result, torch.from_numpy(oracle), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# Layouts


def check_layout(inputs: list[Any], dtype: torch.dtype) -> None:
    """Values, gradients and strides as native's for inputs of these strides.

    Where one of input and weight is channels_last and the other is not, a gradient may also have
    the layout of what it is the gradient of: autograd would copy it into that one anyway.
    """
    case = Conv2dCase("", (), (1, 1, 1, 1), stride=(1, 2), padding=(1, 0))
    ours, theirs = both(case)
    inputs = cast(inputs, dtype)
    # A cast loses strides that overlap or have gaps: float64 tests those.
    truth = values_and_gradients(theirs, cast(inputs, torch.float64), dtype)
    expected = values_and_gradients(theirs, inputs)
    for name, result in values_and_gradients(ours, inputs).items():
        assert_accurate(result, expected[name], truth[name], name)
        if name == "value" or len({suggest_memory_format(x) for x in inputs[:2]}) == 1:
            check_same_layout(result, expected[name], name)


@pytest.mark.layout
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("weight_layout", ["contiguous", "channels_last", "sliced"])
@parametrize("layout", LAYOUTS)
def test_layout(layout: str, weight_layout: str, dtype: torch.dtype) -> None:
    input = LAYOUTS[layout](normal((3, 4, 7, 6), 1).to(dtype))
    weight = LAYOUTS[weight_layout](normal((5, 4, 3, 2), 2).to(dtype))
    check_layout([input, weight, sliced(normal((5,), 3).to(dtype))], dtype)


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
def test_layout_unbatched(layout: str) -> None:
    input = LAYOUTS[layout](normal((4, 7, 6), 1))
    check_layout([input, normal((5, 4, 3, 2), 2), None], torch.float64)


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
@parametrize("case", [case for case in CONV2D if case.id in ("3x3", "depthwise", "deep")], ids=ids)
def test_layout_of_grad_output(case: Conv2dCase, layout: str) -> None:
    tensors = [x.requires_grad_() for x in case.tensors() if x is not None]
    output = both(case)[0](*tensors)
    grad_output = LAYOUTS[layout](normal(output.shape, 4))
    strided = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    plain = torch.autograd.grad(output, tensors, grad_output.contiguous())
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# Special values, gradients on demand


@pytest.mark.special
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_spread_as_in_native(value: float, dtype: torch.dtype) -> None:
    input, weight = normal((2, 3, 9, 8), 1).to(dtype), normal((4, 3, 3, 3), 2).to(dtype)
    input[1, 2, 4, 3] = value
    weight[0, 2, 1, 1] = 0  # 0 * inf is NaN
    weight[3] = 0
    # In float64: native's bfloat16 spreads NaN beyond the windows that hold one, where it uses AMX.
    ours, theirs = F.conv2d(input, weight), native.conv2d(input.double(), weight.double())
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(ours), test(theirs))
    assert ours[0].isfinite().all()


@pytest.mark.special
@parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@parametrize("stride", [1, 2])
@parametrize("where", [0, 1, 2], ids=["input", "weight", "grad_output"])
@parametrize("value", [float("nan"), float("inf")])
@parametrize(
    ("channels", "outputs", "groups"),
    [(5, 5, 5), (3, 2, 1), (9, 4, 1), (4, 9, 1), (9, 10, 1), (70, 70, 1)],
    ids=["depthwise", "few", "few outputs", "few inputs", "thick", "few pixels"],
)
def test_special_values_in_gradients(
    channels: int,
    outputs: int,
    groups: int,
    value: float,
    where: int,
    stride: int,
    layout: torch.memory_format,
) -> None:
    """They stay where native's stay: not even their product with a zero reaches a neighbour."""
    tensors = normal((2, channels, 9, 8), 1), normal((outputs, channels // groups, 3, 3), 2)
    covector = normal(native.conv2d(*tensors, None, stride, 0, 1, groups).shape, 3)
    for column in (0, 2):
        (*tensors, covector)[where][0, 0, 1, column] = value

    def gradients(op: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype, memory_format=layout).requires_grad_() for x in tensors]
        result = op(*leaves, None, stride, 0, 1, groups)
        return torch.autograd.grad(result, leaves, covector.to(dtype))

    for ours, theirs in zip(
        gradients(F.conv2d, torch.float32), gradients(native.conv2d, torch.float64), strict=True
    ):
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(test(ours), test(theirs))


@pytest.mark.special
@parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_infinite_gradient_beside_the_padding(layout: torch.memory_format) -> None:
    """It is no part of the sums of those cells that meet nothing but padding there."""
    input, grad_output = normal((1, 70, 5, 5), 1), normal((1, 70, 5, 5), 2)
    grad_output[0, 0, 0, 0] = float("inf")
    tensors = [x.to(torch.float32, memory_format=layout) for x in (grad_output, input)]
    grad = torch.ops.dlops.conv2d_grad_weight(*tensors, [3, 3], [1, 1], [1] * 4, [1, 1], 1)
    meets = torch.tensor([False, True, True])
    finite = ~(meets[:, None] & meets).expand(70, 3, 3)
    assert torch.equal(grad[0].isfinite(), finite)
    assert grad[1:].isfinite().all()


@pytest.mark.native
@parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_on_demand(needed: tuple[int, ...]) -> None:
    """Inputs that need no gradient get none, and the others' do not change."""
    case = SMALL_CONV2D[0]
    ours = both(case)[0]
    everything = values_and_gradients(ours, case.tensors())
    tensors = [x for x in case.tensors() if x is not None]
    for i in needed:
        tensors[i].requires_grad_()
    output = ours(*tensors)
    output.backward(normal(output.shape, 99))
    for i, x in enumerate(tensors):
        if i in needed:
            assert x.grad is not None
            assert torch.equal(x.grad, everything[f"gradient {i}"])
        else:
            assert x.grad is None


@pytest.mark.native
def test_no_graph_where_none_is_needed() -> None:
    tensors = SMALL_CONV2D[0].tensors()
    assert not F.conv2d(*tensors).requires_grad
    with torch.no_grad():
        assert not F.conv2d(*(x.requires_grad_() for x in tensors if x is not None)).requires_grad


@pytest.mark.native
@parametrize("case", [case for case in SMALL_CONV2D if case.bias], ids=ids)
def test_runs_our_kernels(case: Conv2dCase) -> None:
    check_runs_ours(both(case)[0], case.tensors(), "conv2d")


# ---------------------------------------------------------------------------------------------
# Determinism


@pytest.mark.determinism
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", [SMALL_CONV2D[0], *LARGE_CONV2D], ids=ids)
def test_same_bits_on_every_run_and_thread_count(case: Conv2dCase, dtype: torch.dtype) -> None:
    tensors = cast(case.tensors(), dtype)
    results = []
    for count in (2, 1, 2):
        with threads(count):
            results.append(values_and_gradients(both(case)[0], tensors))
    check_same_bits(results)


# ---------------------------------------------------------------------------------------------
# Laws, on small integers, where they hold exactly

sizes = partial(st.integers, 1)


@st.composite
def conv2d_cases(
    draw: st.DrawFn, most_images: int = 3, most_channels: int = 4, multiple: int = 1
) -> Conv2dCase:
    """The channels of a group are multiples of `multiple`."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(sizes(3))
    kernel, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 3)
    channels, outputs = (multiple * draw(sizes(most_channels)) for _ in range(2))
    # At least as large as the kernel reaches, less what the padding gives.
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    image = [draw(st.integers(size, size + 9)) for size in least]
    return Conv2dCase(
        "drawn",
        (draw(sizes(most_images)), groups * channels, image[0], image[1]),
        (groups * outputs, channels, *kernel),
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@st.composite
def large_conv2d_cases(draw: st.DrawFn) -> Conv2dCase:
    """Images of many rows, which are cut into strips, under kernels that reach past one."""

    def pair(values: st.SearchStrategy[int]) -> tuple[int, int]:
        return draw(values), draw(values)

    kernel, dilation = pair(st.integers(1, 5)), pair(st.sampled_from([1, 1, 2, 6, 13]))
    padding = pair(st.integers(0, 14))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    image = [max(size, draw(st.integers(12, 70))) for size in least]
    channels, outputs = pair(st.sampled_from([1, 3, 8, 16, 33, 64]))
    return Conv2dCase(
        "drawn",
        (draw(sizes(2)), channels, *image),
        (outputs, channels, *kernel),
        stride=pair(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
    )


@st.composite
def first_layers(draw: st.DrawFn) -> Conv2dCase:
    """Images of few channels that meet rows of outputs, or channels, which fill vectors or not."""

    def pair(values: st.SearchStrategy[int]) -> tuple[int, int]:
        return draw(values), draw(values)

    kernel, dilation, padding = (pair(st.integers(*ends)) for ends in [(1, 7), (1, 3), (0, 4)])
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    image = [draw(st.integers(size, size + 40)) for size in least]
    groups, channels = draw(sizes(2)), draw(st.sampled_from([1, 2, 3, 8]))
    outputs = draw(st.sampled_from([7, 16, 17, 24, 31, 32, 40, 64, 100]))
    return Conv2dCase(
        "drawn",
        (draw(sizes(2)), groups * channels, *image),
        (groups * outputs, channels, *kernel),
        stride=pair(st.integers(1, 5)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


def inner(x: Tensor, y: Tensor) -> float:
    return (comparable(x) * comparable(y)).sum().item()


@pytest.mark.property
@given(conv2d_cases())
def test_linear_in_input_and_weight(case: Conv2dCase) -> None:
    conv = both(case)[0]
    x, weight, _ = case.tensors(small_integers)
    y, other = small_integers(case.input, 7), small_integers(case.weight, 8)
    assert torch.equal(conv(2 * x + y, weight), 2 * conv(x, weight) + conv(y, weight))
    assert torch.equal(conv(x, 2 * weight + other), 2 * conv(x, weight) + conv(x, other))


@pytest.mark.property
@parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@settings(max_examples=100)
@given(case=first_layers())
def test_first_layers_are_exact(case: Conv2dCase, dtype: torch.dtype) -> None:
    check_exact(*both(case), case.tensors(small_integers), dtype)


@pytest.mark.property
@given(conv2d_cases())
def test_gradients_are_adjoint(case: Conv2dCase) -> None:
    """<conv(x, w), y> = <x, grad_input(y)> = <w, grad_weight(y)>."""
    x, weight = (t.requires_grad_() for t in case.tensors(small_integers)[:2])
    output = F.conv2d(x, weight, None, **case.arguments())
    y = small_integers(output.shape, 9)
    grad_input, grad_weight = torch.autograd.grad(output, (x, weight), y)
    assert inner(output, y) == inner(x, grad_input) == inner(weight, grad_weight)


@pytest.mark.property
@given(conv2d_cases())
def test_equals_native(case: Conv2dCase) -> None:
    check_exact(*both(case), case.tensors(small_integers), torch.float32)


def check_rounded_once(case: Conv2dCase, layout: Any, dtype: torch.dtype) -> None:
    input, weight, bias = case.tensors(small_integers)
    inputs = [layout(input), layout(weight), bias]
    ours, native = both(case)
    truth = values_and_gradients(native, inputs, dtype, fill=small_integers)
    for name, result in values_and_gradients(
        ours, cast(inputs, dtype), fill=small_integers
    ).items():
        assert torch.equal(result, truth[name].to(dtype)), f"{name} in {dtype}"


@pytest.mark.property
@parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=ids)
@settings(max_examples=40)
@given(
    case=conv2d_cases(most_images=40, most_channels=40),
    layout=st.sampled_from([torch.Tensor.contiguous, channels_last]),
)
def test_sums_are_rounded_once(case: Conv2dCase, layout: Any, dtype: torch.dtype) -> None:
    """Sums of small integers are exact before they are rounded, in every kernel and for every
    remainder that its tiles leave."""
    check_rounded_once(case, layout, dtype)


@pytest.mark.property
@parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@settings(max_examples=100)
@given(case=large_conv2d_cases(), layout=st.sampled_from([torch.Tensor.contiguous, channels_last]))
def test_sums_over_strips_are_rounded_once(
    case: Conv2dCase, layout: Any, dtype: torch.dtype
) -> None:
    check_rounded_once(case, layout, dtype)
