"""dlops.functional.max_pool2d: values, indices, ties, NaN, gradients, layouts and laws."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import native
import pytest
import torch
from cases import LARGE_MAX_POOL2D, LAYOUTS, MAX_POOL2D, MaxPool2dCase, ids
from checks import (
    Fill,
    cast,
    check_against_native,
    check_exact,
    check_gradients,
    check_runs_ours,
    check_same_bits,
    check_same_layout,
    generator,
    normal,
    small_integers,
    threads,
    values_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DTYPES, error
from torch import Tensor

import dlops.functional as F
from dlops import reference

parametrize = pytest.mark.parametrize
EVERY_CASE = MAX_POOL2D + LARGE_MAX_POOL2D
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def both(case: MaxPool2dCase, **more: Any) -> tuple[Any, Any]:
    """Our pooling and native's, with the case's arguments."""
    arguments = {**case.arguments(), **more}
    return partial(F.max_pool2d, **arguments), partial(native.max_pool2d, **arguments)


def check_values_and_indices(case: MaxPool2dCase, input: Tensor) -> None:
    """Equal to native, with and without the indices, and so are the strides."""
    ours, theirs = both(case, return_indices=True)
    for name, result, expected in zip(("value", "index"), ours(input), theirs(input), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        check_same_layout(result, expected, name)
    alone = both(case)[0](input)
    torch.testing.assert_close(alone, theirs(input)[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", EVERY_CASE, ids=ids)
def test_native(case: MaxPool2dCase, dtype: torch.dtype) -> None:
    check_against_native(*both(case), [case.tensor()], dtype)
    check_values_and_indices(case, case.tensor().to(dtype))


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("case", EVERY_CASE, ids=ids)
def test_exact_on_small_integers(case: MaxPool2dCase, dtype: torch.dtype) -> None:
    """Three distinct values: ties in every window decide where the gradient goes."""
    check_exact(*both(case), [case.tensor(small_integers)], dtype)
    check_values_and_indices(case, case.tensor(small_integers).to(dtype))


@pytest.mark.exact
@parametrize("dtype", INTEGERS, ids=ids)
@parametrize("case", EVERY_CASE, ids=ids)
def test_integers(case: MaxPool2dCase, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    input = torch.randint(info.min, info.max, case.input, generator=generator(), dtype=dtype)
    check_values_and_indices(case, input)
    check_values_and_indices(case, torch.full_like(input, info.min))


@pytest.mark.gradcheck
@parametrize("case", MAX_POOL2D, ids=ids)
def test_gradcheck(case: MaxPool2dCase) -> None:
    check_gradients(both(case)[0], [case.tensor()])


@pytest.mark.gradcheck
@parametrize("layout", ["sliced", "channels_last"])
def test_gradcheck_strided(layout: str) -> None:
    case = next(case for case in MAX_POOL2D if case.id == "ceil_padded")
    check_gradients(both(case)[0], [LAYOUTS[layout](case.tensor())])


@pytest.mark.gradcheck
def test_gradcheck_with_indices() -> None:
    """The indices are an output without a gradient."""
    case = MAX_POOL2D[3]
    input = case.tensor().requires_grad_()
    values, indices = both(case, return_indices=True)[0](input)
    assert values.requires_grad
    assert not indices.requires_grad
    check_gradients(lambda x: both(case, return_indices=True)[0](x)[0], [input])


@pytest.mark.oracle
@parametrize("fill", [normal, small_integers])
@parametrize("case", [case for case in MAX_POOL2D if len(case.input) == 4], ids=ids)
def test_oracle(case: MaxPool2dCase, fill: Fill) -> None:
    input = case.tensor(fill)
    ours = values_and_gradients(both(case)[0], [input])
    values, indices = reference.max_pool2d(input.numpy(), **case.arguments())
    grad_output = normal(values.shape, 99).numpy()
    truth = reference.max_pool2d_backward(grad_output, indices, input.shape)
    assert torch.equal(ours["value"], torch.from_numpy(values))
    torch.testing.assert_close(ours["gradient 0"], torch.from_numpy(truth), rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------
# NaN and infinities

INF, NAN = float("inf"), float("nan")


def sprinkled(case: MaxPool2dCase, values: list[float], share: float) -> Tensor:
    """The case's input with that share of it replaced by `values`."""
    input = case.tensor(normal).mul(2).round()
    chosen = torch.rand(input.shape, generator=generator(6))
    for i, value in enumerate(values):
        low, high = share * i / len(values), share * (i + 1) / len(values)
        input[(low <= chosen) & (chosen < high)] = value
    return input


SPECIAL = {
    "some_nan": ([NAN], 0.1),
    "mostly_nan": ([NAN], 0.8),
    "infinities": ([INF, -INF], 0.5),
    "everything": ([NAN, INF, -INF], 0.6),
    "all_minus_inf": ([-INF], 1.1),
    "all_nan": ([NAN], 1.1),
}


@pytest.mark.special
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("fill", SPECIAL)
@parametrize("case", EVERY_CASE, ids=ids)
def test_special_values(case: MaxPool2dCase, fill: str, dtype: torch.dtype) -> None:
    input = sprinkled(case, *SPECIAL[fill]).to(dtype)
    for layout in (Tensor.contiguous, LAYOUTS["channels_last"]):
        check_values_and_indices(case, layout(input))
    ours, theirs = (values_and_gradients(op, [input.double()]) for op in both(case))
    assert error(ours["gradient 0"], theirs["gradient 0"]) < 1e-15


def check_bits(case: MaxPool2dCase, input: Tensor) -> None:
    """Values, indices and gradients, bit for bit. Where windows overlap, every gradient is 1 or -1
    before it is summed: their sums are exact."""
    check_values_and_indices(case, input)
    results = []
    for pool in both(case):
        leaf = input.detach().requires_grad_()
        output = pool(leaf)
        grad_output = normal(output.shape, 1).to(output)
        if case.stride not in (None, case.kernel_size):
            grad_output = grad_output.sign()
        results.append(torch.autograd.grad(output, leaf, grad_output)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    check_same_layout(*results, "gradient")


@pytest.mark.exact
@parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("width", [13, 256], ids=["partial_vectors", "whole_vectors"])
def test_every_number_of_low_precision(width: int, layout: str, dtype: torch.dtype) -> None:
    """On its way into float32 and back: subnormal numbers, infinities and NaN too."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = -(-len(numbers) // (2 * width))
    image = numbers.repeat(2)[: rows * 2 * width].view(1, 2, rows, width)
    image = LAYOUTS[layout](image).requires_grad_()
    output = F.max_pool2d(image, (1, 3), stride=1, padding=(0, 1))
    beside = torch.nn.functional.pad(image.detach().float(), (1, 1), value=-torch.inf)
    expected = torch.stack([beside[..., j : j + width] for j in range(3)]).amax(0)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0, equal_nan=True)
    for step in (2, 3):  # windows side by side, which hand on one gradient each
        alone = F.max_pool2d(image, (1, step), stride=(1, step))
        grad = image.detach()[..., : alone.shape[-1]].nan_to_num(1.0)
        (gradient,) = torch.autograd.grad(alone, image, LAYOUTS[layout](grad))
        found = gradient.unfold(3, step, step)[..., : alone.shape[-1], :].float().sum(-1)
        assert torch.equal(found, grad.float())


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("planes", [(1, 3), (3, 23)])
def test_windows_side_by_side(planes: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    """2 by 2 with stride 2, up to more than two vectors of windows a row, the last one cut or not;
    one plane after the other and many at once. Every input is in one window, so native is exact."""
    for height, width in [(2, 2), (3, 2), (2, 5), (7, 9), (4, 33), (5, 64), (6, 71), (2, 132)]:
        values = normal((*planes, height, width), width)
        ties = values.round()
        nans = values.masked_fill(values > 1.5, float("nan")).masked_fill(values < -1, -torch.inf)
        for ceil_mode in (False, True):
            case = MaxPool2dCase("pairs", values.shape, 2, ceil_mode=ceil_mode)
            for x in (values, ties, nans):
                check_bits(case, LAYOUTS[layout](x.to(dtype)))


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("stride", [1, 2])
@parametrize(
    "kernel_size, padding",
    [(2, 1), (3, 0), (3, 1), (5, 1), (5, 2), ((2, 5), (0, 2)), ((3, 16), (1, 8))],
)
def test_rows_of_several_vectors(
    kernel_size: int | tuple[int, int],
    padding: int | tuple[int, int],
    stride: int,
    dtype: torch.dtype,
) -> None:
    """Vectors of windows at either end of a row, between them, and at both ends at once; planes
    in pairs and alone."""
    for planes, width in [
        ((1, 1), 16),
        ((2, 1), 31),
        ((1, 3), 57),
        ((1, 2), 90),
        ((65, 1), 133),
        ((1, 3), 270),
    ]:
        values = normal((*planes, 11, width), width)
        ties = values.round()
        nans = values.masked_fill(values > 1.5, NAN).masked_fill(values < -1, -INF)
        for ceil_mode in (False, True):
            case = MaxPool2dCase("rows", values.shape, kernel_size, stride, padding, 1, ceil_mode)
            for x in (values, ties, nans):
                check_bits(case, x.to(dtype))


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("channels", [1, 16, 40, 70])
@parametrize("window", [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 2), (2, 3, 0, 1), (5, 1, 2, 1)])
def test_one_nan(
    window: tuple[int, int, int, int], channels: int, layout: str, dtype: torch.dtype
) -> None:
    """Wherever it is, in an image of its own, in rows of several vectors, and in a tall image,
    whose rows threads share."""
    many, wide = normal((63, channels, 9, 7), 1), normal((70, min(channels, 16), 3, 70), 2)
    for i in range(63):
        many[i, i % channels, i // 7, i % 7] = NAN
    for i in range(70):
        wide[i, i % wide.size(1), i % 3, i] = NAN
    tall = normal((1, channels, 70, 7), 3)
    for row in range(0, 70, 9):
        tall[0, row % channels, row, row % 7] = NAN
    for images in (many, wide, tall):
        case = MaxPool2dCase("one_nan", images.shape, *window)
        check_values_and_indices(case, LAYOUTS[layout](images.to(dtype)))


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("window", [(2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 2), (5, 1, 2, 1)])
def test_denormal_numbers_taken_for_zero(
    window: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    """Compared as zeros, but an output is the input's own number."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    images = [small_integers(size).clamp(-1, 1) for size in ((1, 3, 9, 70), (2, 21, 8, 8))]
    images = [LAYOUTS[layout](image.to(dtype).mul(tiny)) for image in images]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot take denormal numbers for zero")
    try:
        with threads(1):  # it holds for the calling thread
            for image in images:
                case = MaxPool2dCase("denormal", image.shape, *window)
                ours, theirs = (pool(image) for pool in both(case))
                kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
                assert torch.equal(ours.view(kind), theirs.view(kind))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.exact
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("size", [(3, 3), (2, 5), (13, 13), (9, 19), (64, 16), (33, 32)], ids=str)
@parametrize("planes", [(1, 15), (16, 1), (3, 21), (1, 64), (2, 65), (7, 37)], ids=str)
def test_small_planes(planes: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
    """Which are pooled many at a time: fewer than that, as many, and some left over."""
    values = normal((*planes, *size), sum(planes))
    ties = values.round()
    nans = values.masked_fill(values > 1.5, NAN).masked_fill(values < -1, -INF)
    windows = [(2, 2, 0, 1), (3, 2, 1, 1), (2, 3, 1, 2), ((3, 2), (1, 4), 1, 1), (5, 1, 2, 1)]
    for window, ceil_mode in product(windows, (False, True)):
        case = MaxPool2dCase("small", values.shape, *window, ceil_mode=ceil_mode)
        for x in (values, ties, nans):
            check_bits(case, x.to(dtype))


@pytest.mark.exact
@parametrize("channels", [3, 16])
@parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_fewer_windows_than_fit(layout: str, channels: int) -> None:
    """The raw operator takes them: what no window reaches has no gradient."""
    grad_output = torch.ones(1, channels, 1, 2)
    cells = torch.zeros(grad_output.shape, dtype=torch.uint8)
    window = [2, 2], [2, 2], [0, 0], [1, 1]
    arguments = LAYOUTS[layout](grad_output), LAYOUTS[layout](cells), [1, channels, 8, 8]
    expected = torch.zeros(1, channels, 8, 8)
    expected[:, :, 0, [0, 2]] = 1
    assert torch.equal(torch.ops.dlops.max_pool2d_scatter(*arguments, *window), expected)


@pytest.mark.exact
@parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@parametrize("kernel_size, stride", [(2, 2), (3, 2), (3, 3)])
@parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_past_the_caches(
    layout: str, kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    """More than 64 MiB of them, which are written past the caches."""
    channels = 64 * 4 // dtype.itemsize
    case = MaxPool2dCase("large", (1, channels, 513, 520), kernel_size, stride)
    x = LAYOUTS[layout](small_integers(case.input).to(dtype))
    assert x.nbytes > 64 << 20
    check_bits(case, x)


@pytest.mark.special
def test_a_window_of_padding_alone() -> None:
    """It is -inf, and its gradient goes nowhere."""
    input = torch.ones(1, 1, 1, 2, requires_grad=True)
    output = F.max_pool2d(input, (1, 2), stride=1, padding=(0, 1), dilation=(1, 3))
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert output.tolist() == [[[[-INF]]]]
    assert gradient.tolist() == [[[[0, 0]]]]


@pytest.mark.special
def test_the_first_maximum_and_the_last_nan_win() -> None:
    windows = torch.tensor([[1, 2, 2, 0], [NAN, 3, NAN, 3], [-INF] * 4], dtype=torch.float32)
    values, indices = F.max_pool2d(windows.reshape(3, 1, 1, 4), (1, 4), return_indices=True)
    assert indices.flatten().tolist() == [1, 2, 0]
    assert values.flatten().isnan().tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------
# Layouts, kernels, memory


@pytest.mark.layout
@parametrize("dtype", [*DTYPES, torch.int32, torch.int64], ids=ids)
@parametrize("layout", LAYOUTS)
@parametrize("case", [c for c in EVERY_CASE if len(c.input) == 4 and "x3_" in c.id], ids=ids)
def test_layout(case: MaxPool2dCase, layout: str, dtype: torch.dtype) -> None:
    check_values_and_indices(case, LAYOUTS[layout](case.tensor().mul(50).to(dtype)))


@pytest.mark.layout
@parametrize("layout", LAYOUTS)
@parametrize("case", [MAX_POOL2D[3], MAX_POOL2D[-1], *LARGE_MAX_POOL2D], ids=ids)
def test_layout_of_gradients(case: MaxPool2dCase, layout: str) -> None:
    input = LAYOUTS[layout](case.tensor()).detach()
    gradients: list[Tensor] = []
    for op in both(case):
        leaf = input.detach().requires_grad_()
        output = op(leaf)
        grad_output = LAYOUTS[layout](normal(output.shape, 4))
        gradients += torch.autograd.grad(output, leaf, grad_output)
    ours, theirs = gradients
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    check_same_layout(ours, theirs, "gradient")


@pytest.mark.native
@parametrize("return_indices", [False, True])
@parametrize("case", MAX_POOL2D, ids=ids)
def test_runs_our_kernels(case: MaxPool2dCase, return_indices: bool) -> None:
    def values(x: Tensor) -> Tensor:
        output = both(case, return_indices=return_indices)[0](x)
        return output[0] if return_indices else output

    check_runs_ours(values, [case.tensor()], "max_pool2d")


@pytest.mark.memory
@parametrize("kernel_size, bytes_per_output", [(2, 1), (16, 1), (17, 8)])
def test_saves_one_byte_per_output(kernel_size: int, bytes_per_output: int) -> None:
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    input = normal((1, 2, 34, 34)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        output = F.max_pool2d(input, kernel_size)
    assert sum(x.numel() * x.element_size() for x in saved) == bytes_per_output * output.numel()


# ---------------------------------------------------------------------------------------------
# Determinism and laws


@pytest.mark.determinism
@parametrize("dtype", DTYPES, ids=ids)
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("image", [(5, 19, 41, 37), (3, 43, 9, 10)], ids=str)
def test_same_bits_on_every_run_and_thread_count(
    image: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    """Overlapping windows: a pixel's gradient is a sum whose order must not change."""
    case = MaxPool2dCase("", image, 5, 1, 2)
    inputs = cast([LAYOUTS[layout](case.tensor())], dtype)
    results = []
    for count in (2, 1, 2):
        with threads(count):
            results.append(values_and_gradients(both(case)[0], inputs))
    check_same_bits(results)


@st.composite
def max_pool2d_cases(draw: st.DrawFn) -> MaxPool2dCase:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, dilation = pair(1, 5), pair(1, 3)
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    # Not below the dilation, where a window can lie in the padding alone: native then writes out of
    # range in its backward.
    reach = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in range(2)]
    least = [max(1, dilation[i], reach[i]) for i in range(2)]
    image = [draw(st.integers(size, size + 9)) for size in least]
    input = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *image)
    return MaxPool2dCase(
        "drawn", input, kernel, pair(1, 4), (padding[0], padding[1]), dilation, draw(st.booleans())
    )


@pytest.mark.property
@given(max_pool2d_cases())
def test_equals_native(case: MaxPool2dCase) -> None:
    check_values_and_indices(case, case.tensor(small_integers))
    check_exact(*both(case), [case.tensor(small_integers)], torch.float32)


@pytest.mark.property
@given(max_pool2d_cases())
def test_scatter_is_the_transpose_of_gather(case: MaxPool2dCase) -> None:
    """<gather(x), y> = <x, scatter(y)>, exactly on small integers; and gather finds the maxima."""
    names = ("kernel_size", "stride", "padding", "dilation")
    geometry = [list(getattr(case, name)) for name in names]
    input, x = case.tensor(), case.tensor(small_integers)
    output, cells = torch.ops.dlops.max_pool2d(input, *geometry, case.ceil_mode)
    assert torch.equal(torch.ops.dlops.max_pool2d_gather(input, cells, *geometry), output)
    y = small_integers(output.shape, 8)
    gathered = torch.ops.dlops.max_pool2d_gather(x, cells, *geometry)
    scattered = torch.ops.dlops.max_pool2d_scatter(y, cells, list(case.input), *geometry)
    assert (gathered * y).sum() == (x * scattered).sum()
