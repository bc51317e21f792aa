"""conv2d in float32 where torch.set_float32_matmul_precision allows sums of bfloat16 products.

With DLOPS_CPU_AMX=1 they are made by AMX, or by tests/tiles/played_tiles.h in a build that plays it
(scripts/sanitize.sh); otherwise 'high' is true float32, as 'highest' is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cases import CONV2D, LAYOUTS, Conv2dCase, ids
from checks import cast, check_same_bits, leaves, normal, values_and_gradients
from torch import Tensor

import dlops.functional as F

parametrize = pytest.mark.parametrize
BY_TILES = os.environ.get("DLOPS_CPU_AMX") == "1"
# Enough channels to be split, in groups, with strides and dilation, odd sizes, borders, few pixels
# and many images, several products of weights.
SPLIT = [
    Conv2dCase("thick", (2, 64, 9, 7), (48, 64, 3, 3), padding=1),
    Conv2dCase("groups", (2, 64, 12, 11), (96, 32, 3, 2), padding=(1, 0), groups=2),
    Conv2dCase("strides", (2, 32, 15, 14), (32, 32, 5, 3), (2, 3), 2),
    Conv2dCase("dilation", (1, 18, 17, 16), (22, 18, 3, 3), 1, 2, (2, 3)),
    Conv2dCase("1x1", (2, 70, 9, 9), (130, 70, 1, 1)),
    Conv2dCase("many_images", (70, 32, 3, 3), (32, 32, 3, 3), padding=1),
]


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def results(case: Conv2dCase, layout: str, precision: str) -> dict[str, Tensor]:
    torch.set_float32_matmul_precision(precision)
    image, *others = cast(case.tensors(normal), torch.float32)
    ours = partial(F.conv2d, **case.arguments())
    return values_and_gradients(ours, [LAYOUTS[layout](image), *others])


@pytest.mark.native
@parametrize("precision", ["high", "medium"])
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("case", SPLIT, ids=ids)
def test_error_of_split_numbers(case: Conv2dCase, layout: str, precision: str) -> None:
    inputs = cast(cast(case.tensors(normal), torch.float32), torch.float64)
    truth = values_and_gradients(partial(torch.conv2d, **case.arguments()), inputs, torch.float32)
    split, whole = (results(case, layout, name) for name in (precision, "highest"))
    for name, exact in truth.items():

        def error(result: Tensor, exact: Tensor = exact) -> float:
            return float((result.double() - exact).norm() / exact.norm())

        assert error(split[name]) < 3e-5, name
        assert error(whole[name]) < 1e-6, name
        if BY_TILES and name != "gradient 2":  # the bias' is a sum
            assert error(split[name]) > 1e-6, f"{name} was not split"
        else:
            assert torch.equal(split[name], whole[name]), name


@pytest.mark.native
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("case", CONV2D, ids=ids)
def test_every_case_at_high_precision(case: Conv2dCase, layout: str) -> None:
    high, highest = (results(case, layout, name) for name in ("high", "highest"))
    for name, expected in highest.items():
        assert (high[name] - expected).norm() <= 3e-5 * expected.norm(), name


@pytest.mark.special
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("where", [0, 1, 2], ids=["input", "weight", "grad_output"])
@parametrize(
    "bits",
    [0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F7FC99E],
    ids=["inf", "nan", "nan of CUDA", "memory of ones", "signaling", "3.4e38"],
)
def test_numbers_without_parts(bits: int, where: int, layout: str) -> None:
    """Infinite ones, every NaN, and what bfloat16 would round to infinity: as at full precision."""
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    image, weight = normal((2, 16, 9, 9)).float(), normal((18, 16, 3, 3), 1).float() / 64
    given = [LAYOUTS[layout](image), weight, normal((2, 18, 9, 9), 2).float()]
    given[where][1, 3, 1, 2] = value
    high, highest = [], []
    for results, precision in ((high, "high"), (highest, "highest")):
        torch.set_float32_matmul_precision(precision)
        inputs = leaves(given[:2])
        output = F.conv2d(*inputs, padding=1)
        results += [output, *torch.autograd.grad(output, inputs, given[2])]
    for ours, expected in zip(high, highest, strict=True):
        assert torch.equal(ours.isfinite(), expected.isfinite())
        assert torch.equal(ours.isnan(), expected.isnan())


@pytest.mark.determinism
@parametrize("case", SPLIT, ids=ids)
def test_same_bits_on_any_number_of_threads(case: Conv2dCase) -> None:
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(case, "contiguous", "high"))
    finally:
        torch.set_num_threads(threads)
    check_same_bits(runs)
