"""Where a call is not measured by native: its faults, and what dlops refuses on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as native
from strategies import FLOATING, INTEGER, Call, both

WINDOWED = ("conv2d", "max_pool2d", "unfold", "fold")
LIMIT = 2**63
LONG = 10**4
"""A stride that oneDNN takes."""


class Axis(NamedTuple):
    """One direction of a window, in exact integers."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def padded(self) -> int:
        return self.size + 2 * self.padding

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, ceil_mode: bool = False) -> int:
        count = (self.padded - self.span + (self.stride - 1 if ceil_mode else 0)) // self.stride + 1
        if ceil_mode and (count - 1) * self.stride >= self.size + self.padding:
            count -= 1
        return max(0, count)

    def window_in_padding(self, ceil_mode: bool) -> bool:
        """Whether some window does not meet the image at all."""
        if self.outputs(ceil_mode) > 10_000:
            return False  # the size alone is refused
        for out in range(self.outputs(ceil_mode)):
            start = out * self.stride - self.padding
            skipped = max(0, -(start // self.dilation))
            if skipped >= self.kernel or start + skipped * self.dilation >= self.size:
                return True
        return False


def axes(op: str, call: Call) -> list[Axis] | None:
    """Both directions of the call's window; None where it has no meaning."""
    spec, arguments = call.specs["input"], call.arguments
    names = ("stride", "padding", "dilation")
    kernel: Any = arguments.get("kernel_size")
    image: Any = arguments.get("output_size") if op == "fold" else spec and spec.shape[-2:]
    if op == "conv2d":
        weight = call.specs["weight"]
        kernel = weight and weight.shape[-2:]
    stride, padding, dilation = (arguments[name] for name in names)
    if padding in ("same", "valid"):
        padding = 0
    values = [image, kernel, kernel if op == "max_pool2d" and not stride else stride]
    for value in (*values, padding, dilation):
        if not isinstance(value, int) and not (isinstance(value, tuple) and 0 < len(value) < 3):
            return None
    parts = (both(value) for value in (*values, padding, dilation))
    found = [Axis(*part) for part in zip(*parts, strict=True)]
    sound = all(a.stride > 0 and a.dilation > 0 and a.kernel > 0 and a.padding >= 0 for a in found)
    return found if sound else None


def elements(op: str, call: Call) -> int:
    """The largest tensor that the call has to do with, in elements."""
    sizes = [math.prod(spec.shape) for spec in call.specs.values() if spec is not None]
    window = axes(op, call) if op in WINDOWED else None
    if window is not None:
        spec = call.specs["input"]
        assert spec is not None
        images = math.prod(spec.shape[:-2])
        pixels = math.prod(axis.outputs(call.arguments.get("ceil_mode", False)) for axis in window)
        cells = 1 if op == "max_pool2d" else math.prod(axis.kernel for axis in window)
        sizes += [images * pixels * cells]
        if op == "max_pool2d":
            sizes += [axis.kernel + axis.padded for axis in window]
        if op == "fold":
            sizes += [images * math.prod(axis.size for axis in window)]
        weight = call.specs.get("weight")
        if weight is not None:
            sizes += [math.prod(spec.shape[:-3]) * math.prod(weight.shape[:1]) * pixels]
    return max(sizes)


def wraps(op: str, call: Call) -> bool:
    """Whether a size or a product of sizes passes 2^63, though every argument fits in 64 bits."""
    window = axes(op, call) if op in WINDOWED else None
    if window is None or any(value >= LIMIT for axis in window for value in axis):
        return False
    return elements(op, call) >= LIMIT or any(max(a.padded, a.span) >= LIMIT for a in window)


def counts_in_32_bits() -> bool:
    """Whether native does, in unfold, fold and max_pool2d: torch 2.11 has -1 windows here."""
    try:
        native.unfold(torch.empty(0, 1, 1, 4), 1, padding=2**31 - 1)
    except RuntimeError:
        return True
    return False


def convolves_in_32_bits() -> bool:
    """Whether conv2d does: torch 2.11 takes a padding of 2^40 for none, and crashes for others."""
    try:
        native.conv2d(torch.empty(2, 1, 3), torch.empty(1, 2, 1, 2), padding=(1, 2**40), dilation=2)
    except RuntimeError:
        return False
    return True


IN_32_BITS = {
    **dict.fromkeys(WINDOWED, counts_in_32_bits()),
    "conv2d": convolves_in_32_bits(),
}


def past_32_bits(op: str, call: Call) -> bool:
    window = axes(op, call) if IN_32_BITS.get(op) else None
    return window is not None and any(max(*a, a.padded, a.span) >= 2**31 for a in window)


def window_in_padding(op: str, call: Call) -> bool:
    window = axes(op, call) if op == "max_pool2d" else None
    ceil_mode = bool(call.arguments.get("ceil_mode"))
    return window is not None and any(axis.window_in_padding(ceil_mode) for axis in window)


def convolves_padding_in_float16(op: str, call: Call) -> bool:
    window = axes(op, call) if op == "conv2d" else None
    half = any(spec is not None and spec.dtype == torch.float16 for spec in call.specs.values())
    return half and window is not None and any(axis.window_in_padding(False) for axis in window)


def no_channels(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    return op == "conv2d" and spec is not None and len(spec.shape) > 2 and spec.shape[-3] == 0


def mixed_devices(op: str, call: Call) -> bool:
    return len({spec.device for spec in call.specs.values() if spec is not None}) > 1


def shape_only(op: str, call: Call) -> bool:
    return any(spec is not None and spec.device == "meta" for spec in call.specs.values())


class Known(NamedTuple):
    reason: str
    applies: Callable[[str, Call], bool]
    refused: bool = False


def gamma_out_of_formula(op: str, call: Call) -> bool:
    gamma = call.arguments.get("gamma", 0.0)
    return isinstance(gamma, (int, float)) and not 0 <= gamma <= 1000


def formula_without_elements(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    empty = spec is not None and 0 in spec.shape
    return op == "focal_loss" and empty and call.arguments["gamma"] != 0


# Native is not run, or its result is no measure. Ours must answer, or (always, where `refused`)
# refuse, and touch no memory.
NATIVE_FAULTS = [
    Known("native's sizes wrap at 2^63: it goes on with what is left", wraps, True),
    Known("native counts windows in 32 bits", past_32_bits),
    Known("native max_pool2d writes out of range for a window of padding alone", window_in_padding),
    Known(
        "oneDNN's float16 convolution crashes where windows see padding alone",
        convolves_padding_in_float16,
    ),
    Known("native conv2d without input channels gives an output without channels", no_channels),
    Known("native takes tensors on the CPU and the meta device together", mixed_devices),
    Known("the formula in native operators holds for moderate gammas", gamma_out_of_formula),
    Known("the formula in native operators needs elements", formula_without_elements),
]


def weight_of_other_dtype(op: str, call: Call) -> bool:
    logits, weight = call.specs.get("input"), call.specs.get("weight")
    if op != "focal_loss" or logits is None or weight is None:
        return False
    return weight.dtype != logits.dtype


def counts_probabilities() -> bool:
    """Whether native refuses these for their number, as torch 2.11 does, before their type."""
    try:
        native.cross_entropy(torch.empty(1), torch.empty(2))
    except ValueError:
        return True
    except RuntimeError:
        return False
    raise AssertionError("native took two targets for one row")


COUNTS_PROBABILITIES = counts_probabilities()


def probabilities_as_labels(op: str, call: Call) -> bool:
    logits, target = call.specs.get("input"), call.specs.get("target")
    if not COUNTS_PROBABILITIES or op != "focal_loss" or logits is None or target is None:
        return False
    return len(logits.shape) == len(target.shape) == 1 and target.dtype in FLOATING


def smoothing_is_nan(op: str, call: Call) -> bool:
    smoothing = call.arguments.get("label_smoothing")
    return smoothing != smoothing


def many_classes(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    return op == "focal_loss" and spec is not None and max(spec.shape, default=0) > 2**24


def bias_of_other_dtype(op: str, call: Call) -> bool:
    spec, bias = call.specs.get("input"), call.specs.get("bias")
    return op == "conv2d" and spec is not None and bias is not None and bias.dtype != spec.dtype


def padded_past_62_bits(op: str, call: Call) -> bool:
    window = axes(op, call) if op in WINDOWED else None
    if window is None:
        return False
    # padding="same" pads by the window's span.
    return any(max(axis.padded, axis.size + axis.span) > 2**62 for axis in window)


def batch_checked_less(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    return op == "conv2d" and spec is not None and math.prod(spec.shape) == 0


def no_kernel_without_data(op: str, call: Call) -> bool:
    dtypes = {spec.dtype for spec in call.specs.values() if spec is not None}
    return shape_only(op, call) and not dtypes <= set(FLOATING)


def integers_without_rows(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    return (
        op == "focal_loss" and spec is not None and spec.dtype not in FLOATING and 0 in spec.shape
    )


# Native answers, and dlops refuses with a message that says so.
REFUSALS = [
    Known("a dtype without a kernel is refused on the meta device as well", no_kernel_without_data),
    Known("the weight must have the dtype of the logits", weight_of_other_dtype),
    Known("integer logits are refused without rows, too", integers_without_rows),
    Known("a label_smoothing that is NaN is outside of [0, 1]", smoothing_is_nan),
    Known("the bias must have the dtype of the input", bias_of_other_dtype),
    Known("a padded input has at most 2^62 rows and columns", padded_past_62_bits),
    Known("at most 2^24 classes", many_classes),
    Known("an empty batch is checked like any other", batch_checked_less),
]


def scalar_or_empty(op: str, call: Call) -> bool:
    shapes = [spec.shape for spec in call.specs.values() if spec is not None]
    return any(not shape or 0 in shape for shape in shapes)


def gamma_is_no_number(op: str, call: Call) -> bool:
    return "gamma" in call.arguments and call.arguments["gamma"] is None


def not_an_image(op: str, call: Call) -> bool:
    spec = call.specs.get("input")
    return op == "unfold" and spec is not None and len(spec.shape) < 3


def other_targets(op: str, call: Call) -> bool:
    spec = call.specs.get("targets")
    return op == "sigmoid_focal_loss" and spec is not None and spec.dtype not in FLOATING


# Both refuse, for different reasons.
OTHER_TYPES = [
    Known("of a wrong dtype and another wrong argument, either may be seen first", other_targets),
    Known("native's errors about scalars and empty tensors come from deep inside", scalar_or_empty),
    Known("native looks for dimensions that are not there", not_an_image),
    Known("a label_smoothing that is NaN is seen first", smoothing_is_nan),
    Known("a gamma that is no number is seen first", gamma_is_no_number),
    Known("native counts the probabilities of a row as labels", probabilities_as_labels),
]


class Extension(NamedTuple):
    """What native refuses and dlops does, and a call that native takes with the same result."""

    reason: str
    applies: Callable[[str, Call], bool]
    instead: Callable[[Call], Call]


def dtype_of(call: Call, name: str) -> torch.dtype | None:
    spec = call.specs.get(name)
    return None if spec is None else spec.dtype


def byte_pooling(op: str, call: Call) -> bool:
    return op == "max_pool2d" and dtype_of(call, "input") in (torch.uint8, torch.int8)


def integer_convolution(op: str, call: Call) -> bool:
    dtypes = {spec.dtype for spec in call.specs.values() if spec is not None}
    return op == "conv2d" and len(dtypes) == 1 and dtypes <= set(INTEGER)


def promoted(op: str, call: Call) -> bool:
    inputs, targets = dtype_of(call, "inputs"), dtype_of(call, "targets")
    promotable = {*FLOATING, *INTEGER, torch.bool, torch.uint16, torch.uint64}
    mixed = inputs != targets and inputs in promotable and targets in FLOATING
    return op == "sigmoid_focal_loss" and mixed


def negative_alpha(op: str, call: Call) -> bool:
    alpha = call.arguments.get("alpha")
    return op == "sigmoid_focal_loss" and isinstance(alpha, (int, float)) and alpha < 0


def long_stride(op: str, call: Call) -> bool:
    window = axes(op, call) if op == "conv2d" else None
    return window is not None and LONG < max(axis.stride for axis in window) < LIMIT


def shorter_stride(call: Call) -> Call:
    """Strides past the end of the image are all alike."""
    window = axes("conv2d", call)
    assert window is not None
    return call.with_arguments(
        stride=tuple(min(axis.stride, max(axis.padded, LONG)) for axis in window)
    )


def class_in_a_list(op: str, call: Call) -> bool:
    logits, target = call.specs.get("input"), call.specs.get("target")
    if op != "focal_loss" or logits is None or target is None:
        return False
    return len(logits.shape) == 1 and logits.shape != target.shape == (1,)


def byte_targets(op: str, call: Call) -> bool:
    return op == "focal_loss" and dtype_of(call, "target") == torch.uint8


def in_dtype(dtype: torch.dtype, *names: str) -> Callable[[Call], Call]:
    def instead(call: Call) -> Call:
        for name in names:
            if call.specs[name] is not None:
                call = call.with_spec(name, cast=dtype)
        return call

    return instead


def in_common_dtype(call: Call) -> Call:
    inputs, targets = call.specs["inputs"], call.specs["targets"]
    assert inputs is not None
    assert targets is not None
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    return in_dtype(dtype, "inputs", "targets")(call)


# What native is never asked: it refuses strides that do not fit in 32 bits and, in torch 2.11, runs
# through those that do one by one. The gradient of a channels_last convolution with a stride of a
# million (2.15) leaves an error in oneDNN's code generator, after which no other convolution of the
# thread can be made.
BEFOREHAND = [Extension("oneDNN has no strides that long", long_stride, shorter_stride)]
# What it is asked only where it refuses the call itself.
EXTENSIONS = [
    Extension(
        "native pools channels_last bytes only where C H W is at most 255 or 127",
        byte_pooling,
        lambda call: call.with_spec("input", layout="contiguous"),
    ),
    Extension(
        "native has no dilated convolution of integers",
        integer_convolution,
        in_dtype(torch.float64, "input", "weight", "bias"),
    ),
    Extension("torchvision takes targets of the inputs' dtype", promoted, in_common_dtype),
    Extension(
        "torchvision takes no negative alpha but -1",
        negative_alpha,
        lambda call: call.with_arguments(alpha=-1.0),
    ),
    Extension(
        "native takes a single row's class in a list, but with label smoothing",
        class_in_a_list,
        lambda call: call.with_spec("target", shape=()),
    ),
    Extension(
        "native takes uint8 classes for rows, not for images",
        byte_targets,
        in_dtype(torch.int64, "target"),
    ),
]
