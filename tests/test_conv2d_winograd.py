"""conv2d by Winograd's F(2x2, 3x3) and F(3x3, 2x2), which 3x3 kernels of stride 1 between many
channels take: of float32, of float16, and of bfloat16 where that is multiplied as float32."""

from __future__ import annotations

import os
from functools import partial

import native
import pytest
import torch
from cases import LAYOUTS, Conv2dCase, ids
from checks import (
    cast,
    check_against_native,
    check_same_bits,
    leaves,
    normal,
    small_integers,
    values_and_gradients,
)

import dlops.functional as F

parametrize = pytest.mark.parametrize
# Odd and even sizes, all paddings, several blocks of outputs with a part of one, groups, channels
# that fill no vector, images of which several make a task, and of which one makes several.
CASES = [
    Conv2dCase("one_tile_more", (2, 48, 9, 8), (64, 48, 3, 3), padding=1),
    Conv2dCase("no_padding", (3, 50, 10, 13), (70, 50, 3, 3)),
    Conv2dCase("wide_padding", (2, 64, 7, 9), (48, 64, 3, 3), padding=(2, 3)),
    Conv2dCase("groups", (2, 100, 11, 8), (130, 50, 3, 3), padding=1, groups=2),
    Conv2dCase("blocks", (2, 65, 8, 8), (110, 65, 3, 3), padding=1),
    Conv2dCase("strips", (2, 64, 30, 41), (49, 64, 3, 3), padding=(1, 0)),
    Conv2dCase("many_weights", (1, 128, 20, 21), (127, 128, 3, 3), padding=1),
    Conv2dCase("few_channels", (3, 32, 9, 11), (35, 32, 3, 3), padding=1),
    Conv2dCase("sums_in_parts", (1, 136, 14, 16), (144, 136, 3, 3), padding=1),
    Conv2dCase("many_images", (13, 64, 8, 8), (64, 64, 3, 3), padding=1),
]
cases = parametrize("case", CASES, ids=ids)
layouts = parametrize("layout", ["contiguous", "channels_last"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Unless these say so, it depends on the machine (test_environment.py sets them).
WIDENED = os.environ.get("DLOPS_CPU_AMX") == os.environ.get("DLOPS_CPU_AVX512_BF16") == "0"
weight_layouts = parametrize("weight_layout", ["contiguous", "channels_last"])


@pytest.mark.exact
@cases
@layouts
@weight_layouts
@dtypes
def test_exact_on_small_integers(
    case: Conv2dCase, layout: str, weight_layout: str, dtype: torch.dtype
) -> None:
    """Coefficients are 1 and 1/2, so that small integers stay exact; the sums are rounded once."""
    image, weight, *rest = case.tensors(small_integers)
    inputs = [LAYOUTS[layout](image), LAYOUTS[weight_layout](weight), *rest]
    truth, results = (
        values_and_gradients(
            partial(f, **case.arguments()), cast(inputs, given), given, small_integers
        )
        for f, given in ((native.conv2d, torch.float64), (F.conv2d, dtype))
    )
    for name, result in results.items():
        assert torch.equal(result, truth[name].to(dtype)), name


@pytest.mark.native
@cases
@layouts
@dtypes
def test_native(case: Conv2dCase, layout: str, dtype: torch.dtype) -> None:
    image, *others = case.tensors(normal)
    ours, theirs = (partial(f, **case.arguments()) for f in (F.conv2d, native.conv2d))
    check_against_native(ours, theirs, [LAYOUTS[layout](image), *others], dtype)


@pytest.mark.native
@cases
@layouts
@parametrize("way", ["winograd", "direct"])
@dtypes
def test_it_is_winograd(
    case: Conv2dCase, layout: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^-24 beside 1 does not survive the transforms whole, as it does in the definition."""
    if dtype == torch.bfloat16 and not WIDENED:
        pytest.skip("bfloat16 may be multiplied as it is")
    monkeypatch.setenv("DLOPS_CPU_CONV2D", way)
    image = LAYOUTS[layout](torch.zeros(case.input, dtype=dtype))
    weight = torch.zeros(case.weight, dtype=dtype)
    weight[0, 0, 1, 0], weight[0, 0, 1, 1] = 1, 2**-24
    image[0, 0, 4, 4] = 1
    arguments = case.arguments()
    output = F.conv2d(image, weight, **arguments)
    assert output.max() == 1
    assert (output == 2**-24).any() == (way == "direct")
    # Under the second and third cell of a row, whose sums share two of a tile's products.
    pad_h, pad_w = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 2
    image[0, 0, 4, 4] = 0
    image[0, 0, 5 - pad_h, 5 - pad_w : 7 - pad_w] = torch.tensor([1, 2**-24])
    grad = torch.zeros_like(output)
    grad[0, 0, 4, 4] = 1
    inputs = leaves([image, weight])
    output = F.conv2d(*inputs, **arguments)
    grad_input, grad_weight = torch.autograd.grad(output, inputs, grad)
    assert grad_input.max() == grad_weight.max() == 1
    assert (grad_input == 2**-24).any() == (way == "direct")
    assert (grad_weight == 2**-24).any() == (way == "direct")


@pytest.mark.invalid
def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLOPS_CPU_CONV2D", "fastest")
    x = torch.ones(1, 48, 8, 8)
    with pytest.raises(ValueError, match=r"must be winograd .* or direct, got fastest"):
        F.conv2d(x, torch.ones(48, 48, 3, 3), padding=1)


@pytest.mark.special
@layouts
@dtypes
@parametrize("where", [0, 1, 2], ids=["input", "weight", "grad_output"])
@parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_special_values_stay_where_they_belong(
    value: float, where: int, dtype: torch.dtype, layout: str
) -> None:
    shapes = (2, 48, 9, 10), (50, 48, 3, 3), (2, 50, 9, 10)
    inputs = [LAYOUTS[layout](normal(size, i).to(dtype)) for i, size in enumerate(shapes)]
    inputs[where][1, 2, 1, 1] = value
    results = []
    for conv in (F.conv2d, native.conv2d):
        x, weight = leaves(inputs[:2])
        output = conv(x, weight, padding=1)
        results.append([output, *torch.autograd.grad(output, [x, weight], inputs[2])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.special
@layouts
@dtypes
def test_an_image_keeps_its_bits_beside_one_that_is_not_finite(
    dtype: torch.dtype, layout: str
) -> None:
    image, grad = normal((3, 48, 9, 10), 1).to(dtype), normal((3, 50, 9, 10), 2).to(dtype)
    weight, results = normal((50, 48, 3, 3), 3).to(dtype), []
    for value in (1.0, float("nan")):
        image[1, 2, 3, 4] = grad[1, 2, 3, 4] = value
        (x,) = leaves([LAYOUTS[layout](image.clone())])
        output = F.conv2d(x, weight, padding=1)
        (grad_input,) = torch.autograd.grad(output, x, LAYOUTS[layout](grad.clone()))
        results.append((output, grad_input))
    for finite, beside in zip(*results, strict=True):
        assert torch.equal(beside[::2], finite[::2])
        assert beside[1].isnan().sum() in (9 * 50, 9 * 48)


@pytest.mark.special
@layouts
def test_large_numbers(layout: str) -> None:
    """The transform adds four of them, which is infinite; no output is."""
    image = LAYOUTS[layout](torch.zeros(1, 48, 9, 10))
    image[0, 3, 2:4, 2:4] = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    weight = torch.full((50, 48, 3, 3), 1 / 16)
    output = F.conv2d(image, weight, padding=1)
    assert output.isfinite().all()
    expected = torch.conv2d(image / 1e38, weight, padding=1)
    assert (output / 1e38 - expected).abs().max() < 1e-6


@pytest.mark.determinism
@cases
@layouts
@dtypes
def test_same_bits(case: Conv2dCase, layout: str, dtype: torch.dtype) -> None:
    """On any number of threads, and of an image alone."""
    image, *others = cast(case.tensors(normal), dtype)
    inputs = [LAYOUTS[layout](image), *others]
    conv = partial(F.conv2d, **case.arguments())
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(values_and_gradients(conv, inputs))
    finally:
        torch.set_num_threads(threads)
    check_same_bits(runs)
    alone = values_and_gradients(conv, [inputs[0][-1:], *others])
    assert torch.equal(alone["value"], runs[0]["value"][-1:])
