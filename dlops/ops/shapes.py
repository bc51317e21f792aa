"""Output sizes, and the checks that come with them, for tensors that have no data.

The fake kernels (meta tensors, torch.compile, torch.export) refuse what csrc/common/checks.h and
csrc/common/focal_checks.h refuse, as far as shapes and dtypes tell. Sizes may be symbolic.
"""

from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64, torch.complex32)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check(op: str, condition: Any, message: str) -> None:
    torch._check(condition, lambda: f"{op}: {message}")


def check_value(op: str, condition: Any, message: str) -> None:
    torch._check_value(condition, lambda: f"{op}: {message}")


def check_dtype(op: str, tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    torch._check_not_implemented(
        tensor.dtype in dtypes, lambda: f"{op}: not implemented for {name} of {tensor.dtype}"
    )


def check_like(op: str, **tensors: Tensor | None) -> None:
    """All on the device and of the dtype of the first."""
    (lead_name, lead), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        check(
            op,
            tensor.device == lead.device,
            "expected all tensors to be on the same device, "
            f"but {lead_name} is on {lead.device} and {name} is on {tensor.device}",
        )
        check(
            op,
            tensor.dtype == lead.dtype,
            f"{lead_name} and {name} must have the same dtype, "
            f"got {lead_name} of {lead.dtype} and {name} of {tensor.dtype}",
        )


def check_shape(op: str, tensor: Tensor, name: str, shape: Any) -> None:
    fits = tensor.dim() == len(shape) and all(
        a == b for a, b in zip(tensor.shape, shape, strict=True)
    )
    check(op, fits, f"expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_sizes(op: str, minimum: int, **lists: Any) -> None:
    """Every value of these lists is at least ``minimum``."""
    for name, values in lists.items():
        for value in values:
            kind = "greater than zero" if minimum else "non-negative"
            check(op, value >= minimum, f"{name} must be {kind}, got {list(values)}")
            check(op, value <= LARGEST, f"{name} must be at most {LARGEST}, got {list(values)}")


# ------------------------------------------------------------------------------------ windows


def conv2d_size(
    op: str,
    input: Any,
    weight: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    *,
    smallest: int = 1,
) -> list[Any]:
    """Height and width of a convolution's output, from the shapes of input and weight.

    Images and kernels must have at least ``smallest`` rows and columns.
    """
    check(op, len(input) == 4, f"input must have 4 dimensions, got shape {tuple(input)}")
    check(op, len(weight) == 4, f"weight must have 4 dimensions, got shape {tuple(weight)}")
    check_sizes(op, 1, stride=stride, dilation=dilation)
    check_sizes(op, 0, padding=padding)
    check(op, groups > 0, f"groups must be greater than zero, got {groups}")
    check(
        op,
        weight[0] % groups == 0 and weight[0] >= groups,
        f"weight's out_channels ({weight[0]}) must be a positive multiple of groups ({groups})",
    )
    check(
        op,
        input[1] == weight[1] * groups,
        f"given groups={groups} and weight of shape {tuple(weight)}, expected input to have "
        f"{weight[1] * groups} channels, got {input[1]}",
    )
    sizes = {"input's height and width": input[2:], "kernel size": weight[2:]}
    check_sizes(op, smallest, **sizes)
    top, left, bottom, right = padding
    padded = [input[2] + top + bottom, input[3] + left + right]
    spans = [step * (kernel - 1) + 1 for step, kernel in zip(dilation, weight[2:], strict=True)]
    check(
        op,
        padded[0] >= spans[0] and padded[1] >= spans[1],
        f"kernel size can't be greater than the padded input: kernel {tuple(weight[2:])} with "
        f"dilation {tuple(dilation)} spans {tuple(spans)}, padded input is {tuple(padded)}",
    )
    return [
        (size - span) // step + 1 for size, span, step in zip(padded, spans, stride, strict=True)
    ]


def unfold_size(
    op: str, input: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> list[Any]:
    """Rows and columns of window positions in images of shape ``input``."""
    check(
        op,
        len(input) == 4 and input[1] > 0,
        f"input must have shape (N, C, H, W) with at least one channel, got {tuple(input)}",
    )
    check_sizes(op, 1, kernel_size=kernel_size)
    sides = [*padding, *padding]
    return conv2d_size(op, input, [1, input[1], *kernel_size], stride, sides, dilation, 1)


def fold_channels(op: str, input: Any, output_size: Any, kernel_size: Any, window: Any) -> Any:
    """Channels of the image that columns of shape ``input`` fold into."""
    check(
        op,
        len(input) == 3 and input[1] > 0 and input[2] > 0,
        f"input must have shape (N, C * kernel cells, positions), got {tuple(input)}",
    )
    check_sizes(op, 1, output_size=output_size, kernel_size=kernel_size)
    cells = kernel_size[0] * kernel_size[1]
    check(
        op,
        input[1] % cells == 0,
        f"input's second dimension must be divisible by the {cells} cells of kernel_size "
        f"{list(kernel_size)}, got shape {tuple(input)}",
    )
    channels = input[1] // cells
    rows, cols = unfold_size(op, [input[0], channels, *output_size], kernel_size, *window)
    check(
        op,
        input[2] == rows * cols,
        f"for output_size {list(output_size)} and kernel_size {list(kernel_size)} input must hold "
        f"{rows} x {cols} positions, got {input[2]}",
    )
    return channels


def pool2d_size(
    op: str, input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil: Any
) -> list[Any]:
    """Height and width of a pooled output, from the shape of input."""
    check(op, len(input) == 4, f"input must have 4 dimensions, got shape {tuple(input)}")
    check_sizes(op, 1, **{"input's channels, height and width": input[1:]})
    check_sizes(op, 1, kernel_size=kernel_size, stride=stride, dilation=dilation)
    check_sizes(op, 0, padding=padding)
    result = []
    for size, kernel, step, pad, spread in zip(
        input[2:], kernel_size, stride, padding, dilation, strict=True
    ):
        check(
            op,
            pad <= kernel // 2,
            f"padding must be at most half of the kernel size, got padding {list(padding)} "
            f"for kernel_size {list(kernel_size)}",
        )
        reach = size + 2 * pad - spread * (kernel - 1) - 1
        count = (reach + (step - 1 if ceil else 0)) // step + 1
        # The last window must start inside the image or its left padding.
        if ceil and (count - 1) * step >= size + pad:
            count -= 1
        result.append(count)
    check(
        op,
        result[0] > 0 and result[1] > 0,
        f"kernel_size {list(kernel_size)} with dilation {list(dilation)} is larger than the padded "
        f"input: the output would be {tuple(result)} for input of shape {tuple(input)}",
    )
    return result


# ------------------------------------------------------------------------------------- losses


def check_sigmoid_focal_loss(
    op: str, inputs: Tensor, targets: Tensor, class_alpha: Tensor | None
) -> None:
    check_dtype(op, inputs, "inputs", FLOATING)
    check_value(
        op,
        inputs.shape == targets.shape,
        f"targets must have the shape of inputs {tuple(inputs.shape)}, got {tuple(targets.shape)}",
    )
    check_like(op, inputs=inputs, targets=targets, alpha=class_alpha)
    if class_alpha is not None:
        check(op, inputs.dim() > 0, "a tensor alpha needs inputs with a last dimension of classes")
        check_shape(op, class_alpha, "alpha", inputs.shape[-1:])


def focal_loss_shape(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: Any,
    label_smoothing: float,
) -> list[Any]:
    """The shape of the unreduced loss."""
    check_dtype(op, input, "input", FLOATING)
    check_dim = torch._check_index if target.is_floating_point() else torch._check
    check_dim(input.dim() >= 1, lambda: f"{op}: input must have at least one dimension")
    check(
        op,
        0 <= label_smoothing <= 1,
        f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}",
    )
    batched = input.dim() > 1
    classes = input.shape[1 if batched else 0]
    loss = [input.shape[0], *input.shape[2:]] if batched else []
    check_value(
        op,
        not batched or (target.dim() > 0 and target.shape[0] == input.shape[0]),
        f"expected input batch_size ({input.shape[0]}) to match target batch_size, "
        f"got input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)}",
    )
    if target.is_floating_point():
        check_shape(op, target, "target", input.shape)
        check_like(op, input=input, target=target)
        check(op, ignore_index < 0, "ignore_index is not supported for a floating point target")
    else:
        check(
            op,
            target.dtype == torch.int64,
            f"target must hold class indices (int64) or class probabilities, got {target.dtype}",
        )
        check(
            op,
            batched or target.shape != input.shape,
            "target in the shape of input must hold class probabilities, "
            f"got {target.dtype} of shape {tuple(target.shape)}",
        )
        check_value(
            op,
            batched or target.dim() != 1,
            f"expected target of one class for input of shape {tuple(input.shape)}, "
            f"got target of shape {tuple(target.shape)}",
        )
        check_shape(op, target, "target", loss)
        check(
            op,
            target.device == input.device,
            f"input is on {input.device} and target is on {target.device}",
        )
    if weight is not None:
        check_shape(op, weight, "weight", [classes])
        check_like(op, input=input, weight=weight)
    return loss
