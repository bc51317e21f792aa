"""Convolution without a column matrix, DLOPS_CUDA_CONV2D=implicit_gemm, implicit_gemm_wgmma or
implicit_gemm_tma: implicit GEMM, on the tensor cores or with all digits of float32, and depthwise
kernels, exact on small integers wherever tiles end, and as near to the truth as native.

test_on_host.py runs these tests on the CPU, where csrc/cuda is compiled as plain C++.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import CONV2D, LAYOUTS, Conv2dCase, ids
from checks import (
    Inputs,
    cast,
    check_same_bits,
    leaves,
    normal,
    small_integers,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, conv2d
from test_conv2d import conv2d_cases
from tolerances import TOLERANCES, assert_accurate, error
from torch import Tensor

import dlops.functional as F
from dlops import _C

DEVICE = os.environ.get("DLOPS_TEST_DEVICE", "cuda")
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu
parametrize = pytest.mark.parametrize
LOW_PRECISION = [torch.bfloat16, torch.float16]
DTYPES = [*LOW_PRECISION, torch.float32]
dtypes = parametrize("dtype", DTYPES, ids=ids)
# The two of low precision share every line but an instruction, which the host has not.
different = parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[::2], ids=ids)
# Products of threads, and the tensor cores' of float64.
all_digits = parametrize("dtype", [torch.float32, torch.float64], ids=ids)
ANY_SHAPE = [("high", dtype) for dtype in (DTYPES if DEVICE == "cuda" else DTYPES[::2])]
ANY_SHAPE += [("highest", torch.float32), ("highest", torch.float64)]
different_low = parametrize("dtype", LOW_PRECISION[: 2 if DEVICE == "cuda" else 1], ids=ids)


def tile_cases(N: int, H: int, W: int, few: tuple[int, int]) -> list[Conv2dCase]:
    """Whole tiles and their ends in every direction, channels that fill whole copies and that do
    not, one part of the pixels and many; images with pixels enough for large tiles, with so `few`
    that these are not wide, and others."""
    return [
        Conv2dCase("whole_tiles", (2, 64, 8, 8), (128, 64, 3, 3), padding=1),
        Conv2dCase("one_more_of_all", (1, 72, 5, 13), (136, 72, 3, 3), padding=1),
        Conv2dCase("large_tiles", (N, 24, H, W), (136, 24, 3, 3)),
        Conv2dCase("large_narrow_tiles", (N, 8, H, W), (40, 8, 1, 2), padding=(0, 1)),
        Conv2dCase("pointwise", (2, 40, 8, 12), (136, 40, 1, 1)),
        Conv2dCase("pointwise_groups", (3, 60, 6, 8), (84, 20, 1, 1), groups=3),
        Conv2dCase("large_pointwise", (N, 72, H, W), (136, 72, 1, 1)),
        Conv2dCase("large_groups", (N, 48, H, W), (144, 24, 1, 2), padding=(0, 1), groups=2),
        Conv2dCase("tiles_too_few_to_be_wide", (1, 24, *few), (128, 24, 1, 2)),
        Conv2dCase("wide_stride", (2, 16, 17, 16), (24, 16, 3, 2), stride=(4, 3), padding=(2, 1)),
        Conv2dCase("stride_and_dilation", (2, 8, 25, 26), (16, 8, 3, 4), (2, 6), 5, (2, 3)),
        Conv2dCase("stride_past_kernel", (2, 8, 16, 15), (8, 8, 2, 1), stride=(5, 3)),
        Conv2dCase("wide_groups", (2, 48, 9, 10), (72, 16, 3, 3), padding=1, groups=3),
        Conv2dCase("filled_up_groups", (2, 36, 9, 10), (30, 12, 3, 3), padding=1, groups=3),
        Conv2dCase("first_layer", (4, 3, 30, 31), (64, 3, 7, 7), stride=2, padding=3),
        Conv2dCase("large_first_layer", (N, 3, H, W), (40, 3, 3, 3), padding=1),
        Conv2dCase("first_layer_groups", (2, 12, 9, 10), (24, 4, 3, 3), (1, 2), 1, (2, 1), 3),
        Conv2dCase("planes_by_8_bytes", (2, 64, 14, 14), (72, 64, 3, 3), padding=1),
        Conv2dCase("planes_by_8_bytes_of_float32", (2, 24, 14, 13), (40, 24, 3, 3), padding=1),
        Conv2dCase("wide_window", (1, 4, 12, 12), (8, 4, 11, 11), padding=5),
        Conv2dCase("few_outputs", (2, 16, 9, 10), (3, 16, 3, 3), stride=2, padding=1),
    ]


def box_cases(
    N: int, H: int, W: int, far: int, copied: tuple[int, int], few: tuple[int, int]
) -> list[Conv2dCase]:
    """Whole boxes of 64 channels and their ends, several images, every reason for a box to be cut
    off, the most that a box can reach and more. `copied`: images that are copied, on the host one
    at a time."""
    return [
        Conv2dCase("boxes", (N, 64, H, W), (144, 64, 3, 3), padding=1),
        Conv2dCase("filled_up_boxes", (N, 100, *copied), (50, 100, 3, 2), padding=(0, 1)),
        Conv2dCase("boxes_of_groups", (N, 128, H, W), (256, 64, 2, 3), padding=1, groups=2),
        Conv2dCase("boxes_without_window", (N, 56, H, W), (136, 56, 1, 1)),
        Conv2dCase("wide_boxes", (N, 48, 2 * H, 3 * W), (128, 48, 3, 4), (2, 3), (2, 1), (2, 1)),
        Conv2dCase("boxes_past_kernel", (N, 64, 2 * H, 2 * W), (128, 64, 1, 1), stride=2),
        Conv2dCase("boxes_too_few_to_be_wide", (1, 128, *few), (128, 128, 1, 2)),
        Conv2dCase("boxes_of_stride_8", (N, 64, H, 8 * W), (128, 64, 1, 2), stride=(1, 8)),
        Conv2dCase("far_boxes", (3 * N, 48, far, 151), (128, 48, 1, 3), 1, (0, 60), (1, 64)),
        Conv2dCase("farthest_boxes", (N, 64, far, 300), (128, 64, 1, 2), 1, (0, 127), (1, 255)),
        Conv2dCase(
            "too_far_for_boxes", (N, 64, 4 * far, 400), (128, 64, 1, 3), (1, 2), 0, (1, 128)
        ),
    ]


# Tiles are large where they occupy two thirds of the multiprocessors: of 91 the fewest, of 180 the
# most. On the host eight are enough (test_on_host.py), and so small images.
FEWEST_TILES, ENOUGH_TILES = 61, 120
GPU_TILES = tile_cases(3, 72, 71, (87, 88))
GPU_BOXES = box_cases(4, 61, 63, 14, (64, 62), (87, 88))
TILES = GPU_TILES if DEVICE == "cuda" else tile_cases(1, 33, 32, (20, 22))
BOXES = GPU_BOXES if DEVICE == "cuda" else box_cases(3, 19, 18, 6, (3 * 19, 2 * 18), (20, 22))
# Without products: vectors of channels, four planes at a time and what is left of them; kernels of
# 3 x 3, which have their own, slabs of 64 channels, outputs that no tap reaches.
DEPTHWISE = [
    Conv2dCase("depthwise_vectors", (3, 24, 9, 10), (24, 1, 3, 3), padding=1, groups=24),
    Conv2dCase("depthwise_slabs", (2, 136, 11, 13), (136, 1, 3, 3), padding=2, groups=136),
    Conv2dCase("depthwise_stride", (3, 72, 12, 9), (72, 1, 3, 3), 2, 1, groups=72),
    Conv2dCase("depthwise_wide_padding", (2, 8, 5, 6), (8, 1, 3, 3), padding=4, groups=8),
    Conv2dCase("depthwise_left_over", (1, 7, 9, 10), (7, 1, 5, 3), padding=(3, 0), groups=7),
    Conv2dCase("depthwise_outputs", (2, 8, 9, 8), (24, 1, 3, 3), (2, 1), 1, groups=8),
    Conv2dCase("depthwise_sparse", (2, 16, 15, 14), (16, 1, 3, 2), (4, 2), 3, (2, 3), 16),
]
CASES = [*CONV2D, *TILES, *DEPTHWISE]


@pytest.fixture(autouse=True)
def implicit_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float32 goes by tensor cores too."""
    monkeypatch.setenv("DLOPS_CUDA_CONV2D", "implicit_gemm")
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def rounded_to_tf32(x: Tensor) -> Tensor:
    return (x.to(torch.float32).view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def on_device(inputs: Inputs) -> list[Any]:
    return [None if x is None else x.to(DEVICE) for x in inputs]


def check_rounded_once(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> None:
    """Sums of small integers are exact before they are rounded."""
    truth = values_and_gradients(
        problem.native, cast(inputs, torch.float64), dtype, fill=small_integers
    )
    results = values_and_gradients(
        problem.ours, on_device(cast(inputs, dtype)), fill=small_integers
    )
    for name, result in results.items():
        assert torch.equal(result.cpu(), truth[name].to(dtype)), f"{name} in {dtype}"


@pytest.mark.exact
@different
@parametrize("layout", ["contiguous", "channels_last", "sliced"])
@parametrize("case", CASES, ids=ids)
def test_exact_on_small_integers(case: Conv2dCase, layout: str, dtype: torch.dtype) -> None:
    problem = conv2d(case, small_integers)
    image, *others = problem.inputs
    check_rounded_once(problem, [LAYOUTS[layout](image), *others], dtype)


def tiles_of(case: Conv2dCase, width: int) -> list[int]:
    """Tiles of 128 pixels by `width` outputs in the output and, where it is one convolution, in the
    gradient of the image."""
    image, weight = (torch.empty(size, device="meta") for size in (case.input, case.weight))
    results = [torch.conv2d(image, weight, **case.arguments())]
    results += [image] if case.stride == 1 else []
    return [
        case.groups * -(-result[:, 0].numel() // 128) * -(-result.shape[1] // case.groups // width)
        for result in results
    ]


@pytest.mark.oracle
@parametrize("case", GPU_TILES + GPU_BOXES, ids=ids)
def test_cases_meet_the_tiles_that_they_are_named_for_on_a_gpu(case: Conv2dCase) -> None:
    """Else small tiles, which ask for no boxes, would be tested in their name."""
    if "too_few" in case.id:
        assert tiles_of(case, 128)[0] < FEWEST_TILES
        assert tiles_of(case, 64)[0] >= ENOUGH_TILES
    elif case in GPU_BOXES or case.id.startswith("large"):
        assert min(tiles_of(case, 128)) >= ENOUGH_TILES


def ask_for(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a device of compute capability 9.0")
    monkeypatch.setenv("DLOPS_CUDA_CONV2D", f"implicit_gemm_{way}")


def id_of(value: Any) -> str | None:
    return value.id if isinstance(value, Conv2dCase) else None


# The two ways differ in the cases that boxes serve.
hopper = parametrize(
    "way, case",
    [*(("wgmma", case) for case in TILES), *(("tma", case) for case in BOXES)],
    ids=id_of,
)


@pytest.mark.exact
@different_low
@parametrize("layout", ["contiguous", "channels_last"])
@hopper
def test_hopper_is_exact_on_small_integers(
    way: str, case: Conv2dCase, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for(way, monkeypatch)
    test_exact_on_small_integers(case, layout, dtype)


@pytest.mark.exact
@parametrize("case", BOXES, ids=ids)
def test_boxes_of_tf32_are_exact_on_small_integers(
    case: Conv2dCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for("tma", monkeypatch)
    test_exact_on_small_integers(case, "channels_last", torch.float32)


@pytest.mark.exact
@all_digits
@parametrize("layout", ["contiguous", "channels_last"])
@parametrize("case", TILES, ids=ids)
def test_all_digits_are_exact_on_small_integers(
    case: Conv2dCase, layout: str, dtype: torch.dtype
) -> None:
    torch.set_float32_matmul_precision("highest")
    test_exact_on_small_integers(case, layout, dtype)


@pytest.mark.exact
@parametrize("precision, dtype", ANY_SHAPE, ids=ids)
@parametrize("multiple", [1, 8])
@settings(max_examples=40)
@given(data=st.data())
def test_exact_on_any_shape(
    multiple: int, precision: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.set_float32_matmul_precision(precision)
    case = data.draw(conv2d_cases(most_channels=20 // multiple, multiple=multiple))
    problem = conv2d(case, small_integers)
    check_rounded_once(problem, problem.inputs, dtype)


@pytest.mark.native
@parametrize("dtype", LOW_PRECISION, ids=ids)
@parametrize("case", CASES, ids=ids)
def test_as_near_to_the_truth_as_native(case: Conv2dCase, dtype: torch.dtype) -> None:
    problem = conv2d(case)
    inputs = cast(problem.inputs, dtype)
    truth = values_and_gradients(problem.native, cast(inputs, torch.float64), dtype)
    theirs = values_and_gradients(problem.native, on_device(inputs))
    for name, result in values_and_gradients(problem.ours, on_device(inputs)).items():
        assert_accurate(result, theirs[name], truth[name], name)


@pytest.mark.native
@different_low
@hopper
def test_hopper_is_as_near_to_the_truth_as_native(
    way: str, case: Conv2dCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for(way, monkeypatch)
    test_as_near_to_the_truth_as_native(case, dtype)


@pytest.mark.native
@parametrize("case", TILES, ids=ids)
def test_tf32_rounds_the_factors_alone(case: Conv2dCase) -> None:
    """Ten bits of mantissa, to the nearest: products and sums of such numbers are float32's."""
    problem = conv2d(case)

    def fill(size: Sequence[int], seed: int) -> Tensor:
        return rounded_to_tf32(normal(size, seed))

    inputs = [None if x is None else rounded_to_tf32(x) for x in problem.inputs]
    truth = values_and_gradients(problem.native, cast(inputs, torch.float64), fill=fill)
    weight, pixels = truth["gradient 1"], truth["value"][:, 0].numel()
    terms = {
        "value": weight[0].numel(),
        "gradient 0": weight[:, 0].numel(),
        "gradient 1": pixels,
        "gradient 2": pixels,
    }
    for name, result in values_and_gradients(problem.ours, on_device(inputs), fill=fill).items():
        # Tensor cores cut off what does not fit while they add up some products at a time.
        bound = TOLERANCES[torch.float32].bound + terms[name] / 8 * 2**-23
        assert error(result, truth[name]) < bound, name


@pytest.mark.native
@parametrize("case", BOXES, ids=ids)
def test_boxes_of_tf32_are_rounded(case: Conv2dCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not cut off, as the instruction itself would do: the error is that of mma.sync."""
    problem = conv2d(case)
    inputs = on_device(cast(problem.inputs, torch.float32))
    truth = values_and_gradients(problem.native, cast(problem.inputs, torch.float64))
    errors = []
    for way in ("wgmma", "tma"):  # wgmma leaves float32 to mma.sync
        ask_for(way, monkeypatch)
        results = values_and_gradients(problem.ours, inputs)
        errors.append({name: error(results[name], truth[name]) for name in results})
    for name, of_mma in errors[0].items():
        assert errors[1][name] < 1.3 * of_mma + 1e-6, name


@pytest.mark.special
@dtypes
@parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_special_values_stay_where_they_belong(value: float, dtype: torch.dtype) -> None:
    image = small_integers((2, 16, 9, 9), 1).abs() + 1
    image[1, 3, 4, 5] = value
    weight = small_integers((8, 16, 3, 3), 2).abs() + 1
    ours = F.conv2d(*on_device(cast([image, weight], dtype)), padding=1).cpu()
    theirs = torch.conv2d(image, weight, padding=1)  # the definition, not an algorithm that spreads
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert ours[0].isfinite().all()
    assert not ours[1].isfinite().all()


@pytest.mark.determinism
@dtypes
def test_same_bits_on_every_run(dtype: torch.dtype) -> None:
    problem = conv2d(Conv2dCase("parts", (4, 16, 40, 41), (32, 16, 3, 3), padding=1))
    inputs = on_device(cast(problem.inputs, dtype))
    check_same_bits([values_and_gradients(problem.ours, inputs) for _ in range(3)])


@pytest.mark.determinism
@different_low
@parametrize("way, case", [("wgmma", TILES[2]), ("tma", BOXES[0])], ids=id_of)
def test_hopper_gives_the_same_bits_on_every_run(
    way: str, case: Conv2dCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for(way, monkeypatch)
    problem = conv2d(case)
    inputs = on_device(cast(problem.inputs, dtype))
    check_same_bits([values_and_gradients(problem.ours, inputs) for _ in range(3)])


@pytest.mark.native
@all_digits
@parametrize("case", [*TILES, *DEPTHWISE], ids=ids)
def test_all_digits_where_they_are_asked_for(case: Conv2dCase, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    problem = conv2d(case)
    inputs = cast(problem.inputs, dtype)
    truth = values_and_gradients(problem.native, cast(inputs, torch.float64), dtype)
    for name, result in values_and_gradients(problem.ours, on_device(inputs)).items():
        assert error(result, truth[name]) < TOLERANCES[dtype].bound, name


@pytest.mark.determinism
@all_digits
@parametrize("case", [TILES[2], BOXES[0]], ids=ids)
def test_all_digits_have_the_same_bits_on_every_run(
    case: Conv2dCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("highest")
    problem = conv2d(case)
    inputs = on_device(cast(problem.inputs, dtype))
    results = [values_and_gradients(problem.ours, inputs) for _ in range(3)]
    check_same_bits(results)
    for way in ("wgmma", "tma"):  # which have no instructions for them
        ask_for(way, monkeypatch)
        check_same_bits([results[0], values_and_gradients(problem.ours, inputs)])


@pytest.mark.special
@all_digits
def test_all_digits_without_a_column_matrix(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the gradient of the image an infinite weight meets the zeros around grad_output in tiles
    alone: im2col has none."""
    torch.set_float32_matmul_precision("highest")
    weight = small_integers((8, 8, 3, 3), 2).abs() + 1
    weight[0, 0, 0, 0] = float("inf")
    finite = []
    for way in ("implicit_gemm", "im2col"):
        monkeypatch.setenv("DLOPS_CUDA_CONV2D", way)
        image = leaves(on_device(cast([torch.ones(1, 8, 6, 6)], dtype)))[0]
        output = F.conv2d(image, *on_device(cast([weight], dtype)))
        (gradient,) = torch.autograd.grad(output, image, torch.ones_like(output))
        finite.append(not gradient.isnan().any())
    assert finite == [False, True]


@pytest.mark.invalid
def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLOPS_CUDA_CONV2D", "fastest")
    x = torch.ones(1, 1, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be unset .* implicit_gemm_tma, got fastest"):
        F.conv2d(x, x)


@pytest.mark.native
def test_it_is_the_tensor_cores_that_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 2^-12 is 1 in TF32."""
    x = torch.full((1, 8, 4, 4), 1 + 2**-12, device=DEVICE)
    weight = torch.ones(8, 8, 1, 1, device=DEVICE)
    conv = partial(F.conv2d, x, weight)
    assert conv().unique().tolist() == [8]
    if DEVICE == "cpu":
        monkeypatch.setenv("DLOPS_CUDA_CONV2D", "im2col")
        assert conv().unique().tolist() == [8 + 2**-9]
    else:
        with torch.profiler.profile() as profile:
            conv()
        assert any("Conv2dTiles" in event.key for event in profile.key_averages())


@pytest.mark.native
@parametrize("precision, expected", [("tf32", 8), ("ieee", 8 + 2**-9)])
def test_either_switch_of_torch_allows_tf32(precision: str, expected: float) -> None:
    torch.set_float32_matmul_precision("highest" if precision == "tf32" else "high")
    torch.backends.cuda.matmul.fp32_precision = precision
    x = torch.full((1, 8, 4, 4), 1 + 2**-12, device=DEVICE)
    weight = torch.ones(8, 8, 1, 1, device=DEVICE)
    assert F.conv2d(x, weight).unique().tolist() == [expected]


def boxes_that_come(function: Callable[[], Any]) -> int:
    """On the GPU, kernels that ask for them; on the host, boxes of pixels."""
    if DEVICE == "cuda":
        with torch.profiler.profile() as profile:
            function()
        return sum(event.count for event in profile.key_averages() if "Copies)2" in event.key)
    count = ctypes.c_int64.in_dll(ctypes.CDLL(_C.__file__), "dlops_boxes_of_pixels")
    count.value = 0
    function()
    return count.value


@pytest.mark.native
@parametrize("dtype", [torch.bfloat16, torch.float32], ids=ids)
@parametrize("case", BOXES, ids=ids)
def test_it_is_boxes_that_come(
    case: Conv2dCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for("tma", monkeypatch)
    problem = conv2d(case)
    x, weight, *rest = on_device(cast(problem.inputs, dtype))
    x = LAYOUTS["channels_last"](x)  # else few images are copied at a time
    came = [boxes_that_come(lambda: problem.ours(x, weight, *rest))]
    for inputs in ([*leaves([x]), weight, *rest], [x, *leaves([weight]), *rest]):
        output = problem.ours(*inputs)
        came.append(boxes_that_come(partial(output.backward, torch.ones_like(output))))
    # Forward, the gradient of the input, that of the weight.
    expected = {
        "boxes_without_window": [True, False, True],
        "too_far_for_boxes": [False, True, False],
    }.get(case.id, [True, True, True])
    if dtype == torch.float32:  # boxes of 32 channels; wgmma does not transpose TF32
        expected = [expected[0], True, False]
    assert [number > 0 for number in came] == expected


def launched(function: Callable[[], Any]) -> Callable[[str], bool]:
    """Whether a kernel was launched whose name holds a word."""
    if DEVICE == "cuda":
        with torch.profiler.profile() as profile:
            function()
        keys = [event.key for event in profile.key_averages()]
        return lambda word: any(word in key for key in keys)
    count = ctypes.CDLL(_C.__file__).dlops_launches
    count.restype = ctypes.c_int64
    before = {word: count(word.encode()) for word in TILE_NAMES}
    function()
    after = {word: count(word.encode()) for word in TILE_NAMES}
    return lambda word: after[word] > before[word]


TILE_NAMES = ("Conv2dTiles", "GradWeightTiles", "PointwiseTiles", "ChannelsLastTiles")
TILE_NAMES += ("WarpProducts", "ThreadProducts", "GroupProducts")


@pytest.mark.native
def test_it_is_wgmma_that_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for("wgmma", monkeypatch)
    problem = conv2d(TILES[2])
    inputs = on_device(cast(problem.inputs, torch.bfloat16))
    was_launched = launched(lambda: values_and_gradients(problem.ours, inputs))
    assert was_launched("GroupProducts")
    assert was_launched("Conv2dTiles")
    assert was_launched("GradWeightTiles")
    assert not was_launched("WarpProducts")


@pytest.mark.native
@parametrize(
    "precision, dtype, products",
    [
        ("high", torch.bfloat16, "WarpProducts"),
        ("high", torch.float32, "WarpProducts"),
        ("highest", torch.float32, "ThreadProducts"),
        ("highest", torch.float64, "WarpProducts"),
    ],
    ids=ids,
)
@parametrize("case", [case for case in TILES if "pointwise" in case.id], ids=ids)
def test_it_is_planes_that_are_multiplied(
    case: Conv2dCase, precision: str, dtype: torch.dtype, products: str
) -> None:
    """Forward and in the gradient of the image."""
    torch.set_float32_matmul_precision(precision)
    problem = conv2d(case)
    x, weight, *rest = on_device(cast(problem.inputs, dtype))
    (x,) = leaves([x])

    def run() -> None:
        output = problem.ours(x, weight, *rest)
        output.backward(torch.ones_like(output))

    was_launched = launched(run)
    assert was_launched("PointwiseTiles")
    assert was_launched(products)
    assert not was_launched("Conv2dTiles")
    assert not was_launched("ChannelsLastTiles")  # no image is turned round


@pytest.mark.native
def test_planes_that_leave_most_of_a_tile_empty_are_turned_round() -> None:
    x = torch.ones(2, 16, 4, 4, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.ones(8, 16, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    was_launched = launched(lambda: F.conv2d(x, weight))
    assert was_launched("Conv2dTiles")
    assert not was_launched("PointwiseTiles")
