"""Bad input: the kind of error that native raises, in words that name the argument and value."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import native
import pytest
import torch
from checks import normal
from torch._subclasses.fake_tensor import FakeTensorMode

import dlops.functional as F

pytestmark = pytest.mark.invalid
parametrize = pytest.mark.parametrize
ops = torch.ops.dlops

# Both sides answer to the same names.
NATIVE = SimpleNamespace(**{**vars(native), "focal_loss": native.cross_entropy})

INPUT = normal((2, 4, 8, 8)).float()
WEIGHT = normal((6, 4, 3, 3)).float()
BIAS = normal((6,)).float()
COLUMNS = normal((2, 36, 36)).float()
COMPLEX = INPUT.to(torch.complex64)
LOGITS = normal((5, 4)).float()
LABELS = torch.tensor([0, 1, 2, 3, 0])
PROBABILITIES = LOGITS.softmax(1)


class Refused(NamedTuple):
    id: str
    call: Callable[[Any], Any]
    argument: str  # must be named in the message
    value: str = ""  # its numbers or its text must stand in the message


def refused_sizes(op: str, name: str, bad: list[Any], call: Callable[..., Any]) -> list[Refused]:
    """The same call with one bad value after another for the argument `name`."""

    def refused(value: Any) -> Refused:
        return Refused(f"{op}-{name}={value}", lambda o: call(o, **{name: value}), name, str(value))

    return [refused(value) for value in bad]


def conv2d(o: Any, **arguments: Any) -> Any:
    return o.conv2d(INPUT, WEIGHT, **arguments)


def max_pool2d(o: Any, **arguments: Any) -> Any:
    return o.max_pool2d(INPUT, **{"kernel_size": 3, **arguments})


def unfold(o: Any, **arguments: Any) -> Any:
    return o.unfold(INPUT, **{"kernel_size": 3, **arguments})


def fold(o: Any, **arguments: Any) -> Any:
    return o.fold(COLUMNS, **{"output_size": 8, "kernel_size": 3, **arguments})


# torch keeps the numbers below -2^62 for symbolic sizes.
BELOW_ONE = [0, -1, (1, 0), (-2, 1), -(2**63), (1, -(2**62) - 1)]
MALFORMED = [(1, 2, 3), 1.5, True, 2**63, (1, 2**64)]

CONV2D = [
    Refused("rank_2", lambda o: o.conv2d(INPUT[0, 0], WEIGHT), "input", "8, 8"),
    Refused("rank_5", lambda o: o.conv2d(INPUT[None], WEIGHT), "input", "1, 2, 4, 8, 8"),
    Refused("weight_rank_3", lambda o: o.conv2d(INPUT, WEIGHT[0]), "weight", "4, 3, 3"),
    Refused("weight_rank_5", lambda o: o.conv2d(INPUT, WEIGHT[None]), "weight", "1, 6, 4, 3, 3"),
    Refused("channels", lambda o: o.conv2d(INPUT[:, :3], WEIGHT), "input", "3"),
    Refused("no_outputs", lambda o: o.conv2d(INPUT, WEIGHT[:0]), "weight", "0, 4, 3, 3"),
    Refused("kernel_over_image", lambda o: o.conv2d(INPUT[..., :2, :2], WEIGHT), "kernel", "3, 2"),
    Refused("kernel_over_width", lambda o: o.conv2d(INPUT[..., :2], WEIGHT), "kernel", "3, 2"),
    Refused("kernel_over_padded", lambda o: conv2d(o, dilation=6, padding=2), "kernel", "13, 12"),
    Refused("no_rows", lambda o: o.conv2d(INPUT[:, :, :0], WEIGHT, padding=2), "input", "0, 8"),
    Refused("bias_size", lambda o: o.conv2d(INPUT, WEIGHT, BIAS[:5]), "bias", "5"),
    Refused("bias_rank", lambda o: o.conv2d(INPUT, WEIGHT, BIAS[:, None]), "bias", "6, 1"),
    Refused("bias_scalar", lambda o: o.conv2d(INPUT, WEIGHT, BIAS[0]), "bias"),
    Refused("weight_dtype", lambda o: o.conv2d(INPUT, WEIGHT.double()), "weight", "Double"),
    Refused("input_dtype", lambda o: o.conv2d(INPUT.half(), WEIGHT), "input", "Half"),
    Refused("bias_dtype", lambda o: o.conv2d(INPUT, WEIGHT, BIAS.double()), "bias", "Double"),
    Refused("bool", lambda o: o.conv2d(INPUT > 0, WEIGHT > 0), "conv2d", "Bool"),
    Refused("groups_input", lambda o: conv2d(o, groups=3), "groups", "3"),
    Refused("groups_output", lambda o: o.conv2d(INPUT, WEIGHT[:5, :2], groups=2), "groups", "2, 5"),
    Refused("groups_over_outputs", lambda o: conv2d(o, groups=8), "groups", "8"),
    Refused("same_stride", lambda o: conv2d(o, padding="same", stride=2), "stride", "2"),
    Refused("same_dilation", lambda o: conv2d(o, padding="same", dilation=-3), "dilation", "-3"),
    Refused(
        "same_dilation_past_64_bits",
        lambda o: conv2d(o, padding="same", dilation=(1, 2**62)),
        "dilation",
        str(2**62),
    ),
    Refused("not_a_tensor", lambda o: o.conv2d([1.0], WEIGHT), "input"),
    Refused("none", lambda o: o.conv2d(None, WEIGHT), "input"),
    *refused_sizes("conv2d", "stride", [*BELOW_ONE, *MALFORMED], conv2d),
    *refused_sizes("conv2d", "dilation", [*BELOW_ONE, *MALFORMED], conv2d),
    *refused_sizes("conv2d", "padding", [-1, (1, -2), -(2**63), *MALFORMED], conv2d),
    *refused_sizes("conv2d", "padding", ["full", "SAME"], conv2d),
    *refused_sizes("conv2d", "groups", [0, -1, -(2**63), 1.5], conv2d),
]

UNFOLD = [
    Refused("unfold-rank_5", lambda o: o.unfold(INPUT[None], 3), "input", "1, 2, 4, 8, 8"),
    Refused("unfold-kernel_over_image", lambda o: o.unfold(INPUT, 9), "kernel", "9, 8"),
    Refused("unfold-no_channels", lambda o: o.unfold(INPUT[:, :0], 3), "input", "2, 0, 8, 8"),
    Refused("unfold-int64", lambda o: o.unfold(INPUT.long(), 3), "unfold", "Long"),
    Refused("unfold-int64_empty", lambda o: o.unfold(INPUT[:0].long(), 3), "unfold", "Long"),
    Refused("fold-int64_empty", lambda o: o.fold(COLUMNS[:0].long(), 8, 3), "fold", "Long"),
    *refused_sizes("unfold", "kernel_size", [*BELOW_ONE, (1, 2, 3), (2,), 2**63], unfold),
    *refused_sizes("unfold", "dilation", [*BELOW_ONE, (1, 2, 3)], unfold),
    *refused_sizes("unfold", "stride", [*BELOW_ONE, (1, 2, 3)], unfold),
    *refused_sizes("unfold", "padding", [-1, (1, -2), (1, 2, 3)], unfold),
    Refused("fold-rank_1", lambda o: o.fold(COLUMNS[0, 0], 8, 3), "input", "36"),
    Refused("fold-rank_4", lambda o: o.fold(COLUMNS[None], 8, 3), "input", "1, 2, 36, 36"),
    Refused("fold-cells", lambda o: o.fold(COLUMNS[:, :35], 8, 3), "kernel_size", "3, 35"),
    Refused("fold-positions", lambda o: o.fold(COLUMNS[..., :35], 8, 3), "input", "35, 36"),
    Refused("fold-output_size", lambda o: o.fold(COLUMNS, 9, 3), "output_size", "9, 49, 36"),
    Refused("fold-no_positions", lambda o: o.fold(COLUMNS[..., :0], 8, 3), "input", "2, 36, 0"),
    *refused_sizes("fold", "output_size", [0, -1, (1, 2, 3)], fold),
    *refused_sizes("fold", "kernel_size", [*BELOW_ONE, (1, 2, 3)], fold),
    *refused_sizes("fold", "dilation", [*BELOW_ONE, (1, 2, 3)], fold),
    *refused_sizes("fold", "stride", [*BELOW_ONE, (1, 2, 3)], fold),
    *refused_sizes("fold", "padding", [-1, (1, -2), (1, 2, 3)], fold),
]

MAX_POOL2D = [
    Refused("pool-rank_2", lambda o: o.max_pool2d(INPUT[0, 0], 2), "input", "8, 8"),
    Refused("pool-rank_5", lambda o: o.max_pool2d(INPUT[None], 2), "input", "1, 2, 4, 8, 8"),
    Refused("pool-kernel_over_image", lambda o: o.max_pool2d(INPUT, 9), "kernel_size", "9, 8"),
    Refused("pool-kernel_over_width", lambda o: o.max_pool2d(INPUT, (2, 9)), "kernel_size", "9, 8"),
    Refused(
        "pool-kernel_over_image_ceil",
        lambda o: o.max_pool2d(INPUT, 10, 1, ceil_mode=True),
        "kernel_size",
        "10, 8",
    ),
    Refused("pool-padding_above_half", lambda o: max_pool2d(o, padding=2), "padding", "2, 3"),
    Refused("pool-padding_width", lambda o: max_pool2d(o, padding=(0, 2)), "padding", "2, 3"),
    Refused(
        "pool-padding_dilated", lambda o: max_pool2d(o, padding=2, dilation=2), "padding", "2, 3"
    ),
    Refused("pool-no_channels", lambda o: o.max_pool2d(INPUT[:, :0], 2), "input", "2, 0, 8, 8"),
    Refused("pool-no_rows", lambda o: o.max_pool2d(INPUT[:, :, :0], 2, padding=1), "input", "0, 8"),
    Refused("pool-bool", lambda o: o.max_pool2d(INPUT > 0, 2), "max_pool2d", "Bool"),
    Refused(
        "pool-complex",
        lambda o: o.max_pool2d(INPUT.to(torch.complex64), 2),
        "max_pool2d",
        "Complex",
    ),
    Refused("pool-complex_empty", lambda o: o.max_pool2d(COMPLEX[:0], 2), "max_pool2d", "Complex"),
    Refused("pool-ceil_mode", lambda o: max_pool2d(o, ceil_mode=1), "ceil_mode", "1"),
    Refused("pool-none", lambda o: o.max_pool2d(None, 2), "input"),
    *refused_sizes("pool", "kernel_size", [*BELOW_ONE, *MALFORMED], max_pool2d),
    *refused_sizes("pool", "stride", [*BELOW_ONE, *MALFORMED], max_pool2d),
    *refused_sizes("pool", "padding", [-1, (0, -1), *MALFORMED], max_pool2d),
    *refused_sizes("pool", "dilation", [*BELOW_ONE, *MALFORMED], max_pool2d),
]


def refused_loss(id: str, argument: str, value: str, *tensors: Any, **arguments: Any) -> Refused:
    def call(o: Any) -> Any:
        return o.focal_loss(*tensors, **arguments)

    return Refused(f"focal-{id}", call, argument, value)


IMAGES, IMAGE_LABELS = normal((2, 3, 4, 5)).float(), torch.zeros(2, 4, 6, dtype=torch.int64)

FOCAL = [
    refused_loss("reduction", "reduction", "average", LOGITS, LABELS, reduction="average"),
    refused_loss("reduction_none", "reduction", "None", LOGITS, LABELS, reduction=None),
    refused_loss("smoothing", "label_smoothing", "1.1", LOGITS, LABELS, label_smoothing=1.1),
    refused_loss(
        "smoothing_of_probabilities",
        "label_smoothing",
        "1.1",
        LOGITS,
        PROBABILITIES,
        label_smoothing=1.1,
    ),
    *(
        refused_loss(f"target_4_{name}", "target", "4", LOGITS, LABELS + 1, reduction=name)
        for name in ("none", "mean", "sum")
    ),
    refused_loss("target_minus_1", "target", "-1", LOGITS, LABELS - 1),
    refused_loss("target_weighted", "target", "4", LOGITS, LABELS + 1, torch.ones(4)),
    refused_loss("target_smoothed", "target", "4", LOGITS, LABELS + 1, label_smoothing=0.1),
    refused_loss("target_of_image", "target", "9", IMAGES, IMAGE_LABELS[..., :5] + 9),
    refused_loss("target_of_row", "target", "7", LOGITS[0], torch.tensor(7)),
    refused_loss("target_batch", "target", "4, 5", LOGITS, LABELS[:4]),
    refused_loss("indices_of_row_as_probabilities", "target", "4", LOGITS[0], LABELS[:4]),
    refused_loss("target_scalar", "target", "5", LOGITS, LABELS[0]),
    refused_loss("target_rank", "target", "5, 1", LOGITS, LABELS[:, None]),
    refused_loss("target_image", "target", "2, 4, 6", IMAGES, IMAGE_LABELS),
    refused_loss("target_image_rank", "target", "2, 4", IMAGES, IMAGE_LABELS[..., 0]),
    refused_loss("target_of_row_batch", "target", "5", LOGITS[0], LABELS),
    refused_loss("probabilities_classes", "target", "5, 3", LOGITS, PROBABILITIES[:, :3]),
    refused_loss("probabilities_batch", "target", "1, 4", LOGITS, PROBABILITIES[:1]),
    refused_loss("indices_as_probabilities", "target", "5, 4", LOGITS, PROBABILITIES.long()),
    *(
        refused_loss(f"target_{name}", "target", name, LOGITS, LABELS.to(dtype))
        for name, dtype in (
            ("Int", torch.int32),
            ("Short", torch.int16),
            ("Bool", torch.bool),
        )
    ),
    refused_loss("target_Float", "target", "5", LOGITS, LABELS.float()),
    refused_loss("weight_size", "weight", "3, 4", LOGITS, LABELS, torch.ones(3)),
    refused_loss("weight_rank", "weight", "1, 4", LOGITS, LABELS, torch.ones(1, 4)),
    refused_loss("weight_dtype", "weight", "Double", LOGITS, LABELS, torch.ones(4).double()),
    refused_loss("weight_of_probabilities", "weight", "3, 4", LOGITS, PROBABILITIES, torch.ones(3)),
    refused_loss("weight_meta", "weight", "meta", LOGITS, LABELS, torch.ones(4, device="meta")),
    refused_loss("target_meta", "target", "meta", LOGITS, LABELS.to("meta")),
    refused_loss("input_meta", "input", "meta", LOGITS.to("meta"), LABELS),
    refused_loss("input_int", "focal_loss", "Long", LOGITS.long(), LABELS),
    refused_loss("input_complex", "focal_loss", "Complex", LOGITS.to(torch.complex64), LABELS),
    refused_loss("no_classes", "target", "0", LOGITS[:, :0], LABELS),
    refused_loss("ignore", "ignore_index", "1", LOGITS, PROBABILITIES, ignore_index=1),
    refused_loss("ignore_float", "ignore_index", "1.5", LOGITS, LABELS, ignore_index=1.5),
]


def refused_sigmoid(id: str, argument: str, value: str, *tensors: Any, **arguments: Any) -> Refused:
    def call(o: Any) -> Any:
        return o.sigmoid_focal_loss(*tensors, **arguments)

    return Refused(f"sigmoid-{id}", call, argument, value)


SIGMOID = [
    refused_sigmoid("reduction", "reduction", "avg", LOGITS, PROBABILITIES, reduction="avg"),
    refused_sigmoid("reduction_none", "reduction", "None", LOGITS, PROBABILITIES, reduction=None),
    refused_sigmoid("targets_rows", "targets", "3, 4, 5", LOGITS, PROBABILITIES[:3]),
    refused_sigmoid("targets_broadcast", "targets", "1, 4, 5", LOGITS, PROBABILITIES[:1]),
    refused_sigmoid("targets_meta", "targets", "meta", LOGITS, PROBABILITIES.to("meta")),
    refused_sigmoid("alpha", "alpha", "2.0", LOGITS, PROBABILITIES, alpha=2.0),
    refused_sigmoid("integer", "targets", "floating point", LOGITS.long(), PROBABILITIES.long()),
    refused_sigmoid("integer_targets", "targets", "floating point", LOGITS, PROBABILITIES.long()),
    refused_sigmoid("bool_targets", "targets", "floating point", LOGITS, PROBABILITIES > 0.5),
    refused_sigmoid("alpha_nan", "alpha", "nan", LOGITS, PROBABILITIES, alpha=float("nan")),
    refused_sigmoid("gamma_none", "gamma", "None", LOGITS, PROBABILITIES, gamma=None),
    refused_sigmoid(
        "complex", "sigmoid_focal_loss", "Complex", LOGITS.to(torch.complex64), PROBABILITIES
    ),
]

EVERY = CONV2D + UNFOLD + MAX_POOL2D + FOCAL + SIGMOID


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def check_message(message: str, argument: str, value: Any) -> None:
    assert re.search(rf"\b{argument}", message), f"does not name {argument}: {message}"
    numbers = re.findall(r"-?\d+(?:\.\d+)?", str(value))
    words = numbers or [str(value)]
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(word)}(?!\d)", message, re.IGNORECASE), (
            f"does not say {word}: {message}"
        )


@parametrize("case", EVERY, ids=lambda case: case.id)
def test_refused(case: Refused) -> None:
    theirs = error_of(lambda: case.call(NATIVE))
    assert theirs is not None, "native accepts this"
    ours = error_of(lambda: case.call(F))
    assert ours is not None, f"accepted; native says {theirs}"
    assert isinstance(ours, type(theirs)), f"{ours!r}, native {theirs!r}"
    check_message(str(ours), case.argument, case.value)


@parametrize("case", EVERY, ids=lambda case: case.id)
def test_refused_without_data(case: Refused) -> None:
    """torch.compile, torch.export and meta tensors meet the same refusals."""
    theirs = error_of(lambda: case.call(NATIVE))
    if isinstance(theirs, IndexError):
        pytest.skip("only the data shows that a class index is out of range")
    with FakeTensorMode(allow_non_fake_inputs=True):
        ours = error_of(lambda: case.call(F))
    assert ours is not None, f"accepted; native says {theirs}"
    assert isinstance(ours, type(theirs)), f"{ours!r}, native {theirs!r}"


# ---------------------------------------------------------------------------------------------
# What looks odd and yet is accepted, with the same result

ACCEPTED: dict[str, Callable[[Any], Any]] = {
    "one_stride_in_a_list": lambda o: conv2d(o, stride=[2]),
    "one_padding_in_a_list": lambda o: conv2d(o, padding=[1]),
    "one_dilation_in_a_tuple": lambda o: conv2d(o, dilation=(2,)),
    "padding_over_image": lambda o: conv2d(o, padding=10),
    "kernel_is_padded_image": lambda o: o.conv2d(INPUT[..., :1, :1], WEIGHT, padding=1),
    "stride_over_image": lambda o: conv2d(o, stride=100),
    "empty_batch": lambda o: o.conv2d(INPUT[:0], WEIGHT),
    "dilation_of_a_1x1_kernel": lambda o: o.conv2d(INPUT, WEIGHT[..., :1, :1], dilation=50),
    "same_stride_1": lambda o: conv2d(o, padding="same", stride=(1, 1)),
    "stride_past_32_bits": lambda o: conv2d(o, stride=2**40),
    "dilation_of_a_1x1_kernel_past_32_bits": lambda o: o.conv2d(
        INPUT, WEIGHT[..., :1, :1], dilation=2**62
    ),
    "unfold_stride_past_32_bits": lambda o: unfold(o, stride=2**62),
    "fold_bool": lambda o: o.fold(COLUMNS > 0, 8, 3),
    "pool_kernel_far_over_image": lambda o: o.max_pool2d(INPUT, 100_001, 1, 50_000),
    "no_weight_for_any_label": lambda o: cross_entropy(
        o, weight=torch.zeros(4), label_smoothing=0.5
    ),
    "pool_stride_none": lambda o: max_pool2d(o, stride=None),
    "pool_stride_empty": lambda o: max_pool2d(o, stride=[]),
    "pool_one_kernel_in_a_list": lambda o: max_pool2d(o, kernel_size=[2]),
    "pool_padding_is_half": lambda o: o.max_pool2d(INPUT, 4, padding=2),
    "pool_kernel_over_image_ceil": lambda o: o.max_pool2d(INPUT, 9, ceil_mode=True),
    "pool_kernel_is_image": lambda o: o.max_pool2d(INPUT, 8),
    "pool_empty_batch": lambda o: o.max_pool2d(INPUT[:0], 2),
    "unfold_padding_over_kernel": lambda o: unfold(o, padding=5),
    "smoothing_1": lambda o: cross_entropy(o, label_smoothing=1.0),
    "smoothing_below_0_is_off": lambda o: cross_entropy(o, label_smoothing=-0.1),
    "ignore_a_class": lambda o: cross_entropy(o, ignore_index=1),
    "ignore_the_least_of_64_bits": lambda o: cross_entropy(o, ignore_index=-(2**63)),
    "sigmoid_scalars": lambda o: o.sigmoid_focal_loss(LOGITS[0, 0], PROBABILITIES[0, 0]),
    "no_channels": lambda o: o.conv2d(INPUT[:, :0], WEIGHT[:, :0], BIAS),
    "no_channels_groups": lambda o: o.conv2d(INPUT[:, :0], WEIGHT[:, :0], groups=2),
    "no_channels_unbatched": lambda o: o.conv2d(INPUT[0, :0], WEIGHT[:, :0], padding=1),
    "no_channels_no_rows": lambda o: o.conv2d(INPUT[:, :0, :0], WEIGHT[:, :0, :0]),
    "sigmoid_empty": lambda o: o.sigmoid_focal_loss(
        LOGITS[:0], PROBABILITIES[:0], reduction="mean"
    ),
}


def cross_entropy(o: Any, **arguments: Any) -> Any:
    if o is F:
        arguments["gamma"] = 0.0
    return o.focal_loss(LOGITS, LABELS, **arguments)


@parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    call = ACCEPTED[name]
    torch.testing.assert_close(call(F), call(NATIVE), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_pooling_with_the_largest_kernel() -> None:
    """No work and no memory for the window's cells in the padding; native takes seconds."""
    image = INPUT.clone().requires_grad_()
    output, indices = F.max_pool2d(image, 2**31 - 1, 1, 2**30 - 1, return_indices=True)
    assert torch.equal(output, INPUT.amax((2, 3), keepdim=True).expand_as(INPUT))
    assert torch.equal(indices[..., 0, 0], INPUT.flatten(2).argmax(2))
    output.sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, (output.detach() == INPUT) * 64.0)


# ---------------------------------------------------------------------------------------------
# What native does not have


@parametrize(
    "counts, beta, argument, value",
    [
        ([], 0.9, "samples_per_class", ""),
        ([[1, 2]], 0.9, "samples_per_class", "1, 2"),
        ([3, 0, 5], 0.9, "samples_per_class", "0"),
        ([3, -2], 0.9, "samples_per_class", "-2"),
        ([3, float("nan")], 0.9, "samples_per_class", "nan"),
        ([3, float("inf")], 0.9, "samples_per_class", "inf"),
        ([3, 5], 1.0, "beta", "1.0"),
        ([3, 5], -0.1, "beta", "-0.1"),
        ([3, 5], 1.5, "beta", "1.5"),
        ([3, 5], float("nan"), "beta", "nan"),
    ],
)
def test_class_balanced_weight(counts: Any, beta: float, argument: str, value: str) -> None:
    for given in (counts, torch.tensor(counts)):
        with pytest.raises(ValueError, match=argument) as error:
            F.class_balanced_weight(given, beta)
        check_message(str(error.value), argument, value)


@parametrize("size", [(3,), (4, 1), (2, 4)], ids=str)
def test_alpha_for_each_class_must_fit(size: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError), match="alpha") as error:
        F.sigmoid_focal_loss(LOGITS, PROBABILITIES, torch.full(size, 0.5))
    check_message(str(error.value), "alpha", str(size))


@parametrize("which", ["weight", "bias"])
def test_conv2d_on_mixed_devices(which: str) -> None:
    """Native lets the meta device through, and gives a meta tensor; nothing else may come out."""
    tensors: dict[str, Any] = {"weight": WEIGHT, "bias": BIAS}
    tensors[which] = tensors[which].to("meta")
    try:
        output = F.conv2d(INPUT, **tensors)
    except RuntimeError as error:
        assert "device" in str(error)  # noqa: PT017
    else:
        assert output.is_meta


# ---------------------------------------------------------------------------------------------
# Sizes that overflow, and raw operators: refused, and no memory is touched

HUGE = [2**31, 2**40, 2**62, 2**63 - 1]


@parametrize("size", HUGE)
@parametrize("argument", ["stride", "padding", "dilation"])
@parametrize("call", [conv2d, max_pool2d, unfold, fold], ids=lambda call: call.__name__)
def test_huge_arguments(call: Any, argument: str, size: int) -> None:
    """Either refused or, where a stride is that long, right; never a crash."""
    try:
        output = call(F, **{argument: size})
    except (RuntimeError, MemoryError, OverflowError):
        return
    assert argument == "stride"
    assert torch.equal(output, call(F, stride=1000))


POOL = ([2, 2], [2, 2], [0, 0], [1, 1])
POOLED, CELLS = INPUT[..., :4, :4], torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
CONV = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
GRAD = normal((2, 6, 6, 6)).float()
PAIR = [True, True]
SCALAR = torch.tensor(1.0)

RAW: dict[str, Callable[[], Any]] = {
    "grad_input_size": lambda: ops.conv2d_grad_input(GRAD, WEIGHT, [2, 4, 9, 8], *CONV),
    "grad_input_batch": lambda: ops.conv2d_grad_input(GRAD, WEIGHT, [3, 4, 8, 8], *CONV),
    "grad_input_channels": lambda: ops.conv2d_grad_input(GRAD, WEIGHT, [2, 5, 8, 8], *CONV),
    "grad_input_negative": lambda: ops.conv2d_grad_input(GRAD, WEIGHT, [-2, 4, 8, 8], *CONV),
    "grad_input_outputs": lambda: ops.conv2d_grad_input(GRAD[:, :5], WEIGHT, [2, 4, 8, 8], *CONV),
    "grad_weight_kernel": lambda: ops.conv2d_grad_weight(GRAD, INPUT, [2, 3], *CONV),
    "grad_weight_batch": lambda: ops.conv2d_grad_weight(GRAD[:1], INPUT, [3, 3], *CONV),
    "grad_weight_dtype": lambda: ops.conv2d_grad_weight(GRAD.double(), INPUT, [3, 3], *CONV),
    "grad_bias_rank": lambda: ops.conv2d_grad_bias(GRAD[0]),
    "cells_shape": lambda: ops.max_pool2d_gather(INPUT, CELLS[:, :, :3, :3, None], *POOL),
    "cells_too_many": lambda: ops.max_pool2d_gather(INPUT, CELLS.repeat(1, 1, 2, 2), *POOL),
    "cells_dtype": lambda: ops.max_pool2d_gather(INPUT, CELLS.long(), *POOL),
    "cells_batch": lambda: ops.max_pool2d_scatter(POOLED, CELLS[:1], [2, 4, 8, 8], *POOL),
    "scatter_size": lambda: ops.max_pool2d_scatter(POOLED, CELLS, [2, 4, 2, 2], *POOL),
    "scatter_negative": lambda: ops.max_pool2d_scatter(POOLED, CELLS, [2, 4, -8, 8], *POOL),
    "indices_size": lambda: ops.max_pool2d_indices(CELLS, [2, 4, 2, 2], *POOL),
    "sigmoid_reduction": lambda: ops.sigmoid_focal_loss(LOGITS, PROBABILITIES, None, 0.25, 2.0, 7),
    "sigmoid_alpha": lambda: ops.sigmoid_focal_loss(
        LOGITS, PROBABILITIES, torch.ones(3), 0.25, 2.0, 0
    ),
    "sigmoid_grad": lambda: ops.sigmoid_focal_loss_vjp(
        LOGITS[:2], LOGITS, PROBABILITIES, None, 0.25, 2.0, 0, PAIR
    ),
    "focal_reduction": lambda: ops.focal_loss(LOGITS, LABELS, None, 2.0, -100, 7, 0.0),
    "focal_grad": lambda: ops.focal_loss_vjp(
        LOGITS[:2, 0], SCALAR, LOGITS, LABELS, None, 2.0, -100, 0, 0.0, [True, False]
    ),
    "focal_target": lambda: ops.focal_loss_vjp(
        SCALAR, SCALAR, LOGITS, LABELS + 10**12, None, 2.0, -100, 1, 0.0, [True, False]
    ),
    "focal_jvp_target": lambda: ops.focal_loss_jvp(
        SCALAR, LOGITS, None, LOGITS, LABELS - 10**12, None, 2.0, -100, 1, 0.0
    ),
    "focal_tangent": lambda: ops.focal_loss_jvp(
        SCALAR, LOGITS[:1], None, LOGITS, LABELS, None, 2.0, -100, 1, 0.0
    ),
    "focal_normalizer": lambda: ops.focal_loss_vjp(
        SCALAR, torch.ones(0), LOGITS, LABELS, None, 2.0, -100, 1, 0.0, [True, False]
    ),
}


@parametrize("name", RAW)
def test_raw_operators_refuse(name: str) -> None:
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        RAW[name]()


CELLS_OUT_OF_RANGE = """
import torch, dlops
ops = torch.ops.dlops
size = [1, 1, 34, 1 << 18]
for kernel_size, value in (([2, 2], 255), ([17, 17], 2**40), ([17, 17], -(2**40))):
    window = (kernel_size, kernel_size, [0, 0], [1, 1])
    image = torch.zeros(size)
    output, cells = ops.max_pool2d(image, *window, False)
    cells.fill_(value)
    for call in (
        lambda: ops.max_pool2d_scatter(output, cells, size, *window),
        lambda: ops.max_pool2d_gather(image, cells, *window),
        lambda: ops.max_pool2d_indices(cells, size, *window),
    ):
        try:
            call()
        except RuntimeError:
            pass
"""


def test_cells_out_of_range_touch_no_memory() -> None:
    """Cells that no pooling gave lead far out of the image. A failure would kill the process."""
    run = subprocess.run([sys.executable, "-c", CELLS_OUT_OF_RANGE], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stderr[-2000:]}"


def test_no_images_with_outputs_without_measure() -> None:
    """Nothing overflows where nothing is worked out: so the sanitizers say."""
    images, options = torch.empty(0, 1, 4, 4), {"kernel_size": 1, "padding": 2**31}
    ours = F.unfold(images, **options)
    assert ours.shape == torch.nn.functional.unfold(images, **options).shape
