"""The stateless API, with the signatures of ``torch.nn.functional``.

Every function runs dlops' own kernels on CPU and CUDA tensors, is differentiable (convolution and
pooling to any order, focal losses to the second), and works under ``torch.compile``, ``torch.func``
and autocast. What has no kernel here is an error; nothing falls back to torch's op.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dlops.ops import conv2d as _conv2d
from dlops.ops import focal_loss as _focal_loss
from dlops.ops import max_pool2d as _max_pool2d
from dlops.ops import sigmoid_focal_loss as _sigmoid_focal_loss
from dlops.ops import unfold as _unfold
from dlops.ops.common import (
    MEAN,
    NONE,
    autocast,
    check_bool,
    check_int,
    check_number,
    check_tensor,
    differentiable,
    fits,
    has_tangent,
    pair,
    reduction_number,
)
from dlops.ops.shapes import FLOATING

Size = int | Sequence[int]

# Beyond this a gamma makes no difference, and its square would overflow float32.
LARGEST_GAMMA = 1e18

__all__ = [
    "class_balanced_weight",
    "conv2d",
    "focal_loss",
    "fold",
    "max_pool2d",
    "sigmoid_focal_loss",
    "unfold",
]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution; the same function as :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W). Floating point, complex or integer; contiguous or
            channels_last, and the output is laid out alike.
        weight: (O, C / groups, R, S), of input's dtype.
        bias: (O), of input's dtype.
        stride: step of the window, one int or (height, width).
        padding: zeros added on both sides, one int or (height, width); ``"valid"`` for none, or
            ``"same"`` for an output of the input's size (stride 1 only).
        dilation: distance between kernel elements.
        groups: the channels are split into this many independent convolutions.

    Returns:
        (N, O, OH, OW), or (O, OH, OW) for an unbatched input. Images without channels give an
        output without channels, as native does.

    Raises:
        RuntimeError: shapes that do not fit together, a stride or dilation below 1, a negative
            padding, a kernel larger than the padded input, tensors of mixed dtypes or devices.

    Example::

        >>> import torch, dlops.functional as F
        >>> F.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3), padding=1).shape
        torch.Size([1, 4, 8, 8])
    """
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            conv2d, tensors, input, weight, bias, stride, padding, dilation, groups
        )
    stride = pair(stride, "stride", "conv2d")
    dilation = pair(dilation, "dilation", "conv2d")
    images, unbatched = _batched(input, "conv2d")
    check_tensor(weight, "weight", "conv2d")
    check_int(groups, "groups", "conv2d")
    if weight.dim() != 4:
        raise RuntimeError(
            "conv2d: weight must have 4 dimensions (out_channels, in_channels / groups, kernel_h, "
            f"kernel_w), got shape {tuple(weight.shape)}"
        )
    sides = _conv_padding(padding, weight, stride, dilation)
    images, weight, bias = autocast("lower_precision", images, weight, bias)
    convolve = _conv2d.conv2d if images.shape[1] else _conv2d.conv2d_without_channels
    output = convolve(images, weight, bias, stride, sides, dilation, groups)
    return output.squeeze(0) if unbatched else output


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """2-D max pooling; the same function as :func:`torch.nn.functional.max_pool2d`.

    The first of equal maxima wins, and a NaN in the window makes the output NaN.

    Args:
        input: (N, C, H, W) or (C, H, W), floating point or integer; contiguous or channels_last,
            and the output is laid out alike.
        kernel_size: size of the window, one int or (height, width).
        stride: step of the window; by default kernel_size.
        padding: -infinity added on both sides, at most half of kernel_size.
        dilation: distance between the window's elements.
        ceil_mode: whether a last window that only begins inside the input counts.
        return_indices: whether to return the maxima's positions as well.

    Returns:
        The output (N, C, OH, OW) or (C, OH, OW); with return_indices, the pair of it and the int64
        positions of the maxima in the flattened H x W plane, as max_unpool2d takes them.

    Raises:
        RuntimeError: a wrong number of dimensions, a stride or dilation below 1, a padding above
            half of kernel_size, a window larger than the padded input.
        NotImplementedError: a dtype that native does not pool either (bool, complex).

    Example::

        >>> import torch, dlops.functional as F
        >>> F.max_pool2d(torch.arange(16.0).view(1, 4, 4), 2)
        tensor([[[ 5.,  7.],
                 [13., 15.]]])
    """
    if has_torch_function((input,)):
        return handle_torch_function(
            max_pool2d,
            (input,),
            input,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
    kernel_size = pair(kernel_size, "kernel_size", "max_pool2d")
    no_stride = stride is None or (isinstance(stride, (list, tuple)) and not stride)
    window = (
        kernel_size,
        kernel_size if no_stride else pair(stride, "stride", "max_pool2d"),  # type: ignore[arg-type]
        pair(padding, "padding", "max_pool2d"),
        pair(dilation, "dilation", "max_pool2d"),
    )
    check_bool(ceil_mode, "ceil_mode", "max_pool2d")
    images, unbatched = _batched(input, "max_pool2d")
    if not return_indices:
        output = _max_pool2d.max_pool2d_values(images, *window, ceil_mode)
        return output.squeeze(0) if unbatched else output
    output, cells = _max_pool2d.max_pool2d(images, *window, ceil_mode)
    indices = torch.ops.dlops.max_pool2d_indices(cells, images.shape, *window)
    return (output.squeeze(0), indices.squeeze(0)) if unbatched else (output, indices)


def unfold(
    input: Tensor, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> Tensor:
    """im2col: the windows of an image as columns; :func:`torch.nn.functional.unfold`.

    Args:
        input: (N, C, H, W) or (C, H, W), floating point, complex or bool.
        kernel_size, dilation, padding, stride: the window, each one int or (height, width).

    Returns:
        (N, C * kernel cells, positions), or without N for an unbatched input.

    Raises:
        RuntimeError: a wrong number of dimensions, a window that does not fit the padded input, a
            stride, dilation or kernel size below 1, a negative padding.

    Example::

        >>> import torch, dlops.functional as F
        >>> F.unfold(torch.ones(1, 3, 8, 8), 3).shape
        torch.Size([1, 27, 36])
    """
    if has_torch_function((input,)):
        return handle_torch_function(
            unfold, (input,), input, kernel_size, dilation, padding, stride
        )
    images, unbatched = _batched(input, "unfold")
    columns = _unfold.unfold(images, *_window(kernel_size, dilation, padding, stride, "unfold"))
    return columns.squeeze(0) if unbatched else columns


def fold(
    input: Tensor,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Tensor:
    """col2im: sums windows back into an image; :func:`torch.nn.functional.fold`.

    Args:
        input: (N, C * kernel cells, positions) or without N, floating point or complex.
        output_size: height and width of the image.
        kernel_size, dilation, padding, stride: the window, each one int or (height, width).

    Returns:
        (N, C, *output_size), or (C, *output_size) for an unbatched input.

    Raises:
        RuntimeError: a wrong number of dimensions, sizes that do not fit each other.

    Example::

        >>> import torch, dlops.functional as F
        >>> F.fold(torch.ones(1, 27, 36), 8, 3).shape
        torch.Size([1, 3, 8, 8])
    """
    if has_torch_function((input,)):
        return handle_torch_function(
            fold, (input,), input, output_size, kernel_size, dilation, padding, stride
        )
    if input.dim() not in (2, 3):
        raise RuntimeError(
            "fold: expected input of shape (N, C * kernel cells, positions) or, unbatched, "
            f"(C * kernel cells, positions), got shape {tuple(input.shape)}"
        )
    unbatched = input.dim() == 2
    columns = input.unsqueeze(0) if unbatched else input
    window = _window(kernel_size, dilation, padding, stride, "fold")
    image = _unfold.fold(columns, pair(output_size, "output_size", "fold", single=False), *window)
    return image.squeeze(0) if unbatched else image


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """Focal loss for independent binary labels; :func:`torchvision.ops.sigmoid_focal_loss`.

    With p = sigmoid(inputs) and p_t the probability given to the target, the loss of an element is
    ``-alpha_t (1 - p_t)^gamma log(p_t)`` (Lin et al., "Focal Loss for Dense Object Detection",
    2017).
    Value and gradients are finite at any finite logit and any gamma >= 0.

    Args:
        inputs: logits of any shape, floating point.
        targets: 0 or 1, or anything between, in the shape of inputs.
        alpha: weight of the targets 1, against 1 - alpha of the targets 0. A negative value means
            no weighting. A tensor holds one for each class, broadcast over the last dimension.
        gamma: how strongly well-classified elements are played down; 0 is binary cross entropy.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        The losses in the shape of inputs, or a scalar.

    Raises:
        ValueError: an unknown reduction, targets of another shape than inputs, an alpha above 1.
        RuntimeError: an alpha that does not fit the last dimension, tensors on different devices.
        NotImplementedError: inputs or targets that are not floating point.

    Example::

        >>> import torch, dlops.functional as F
        >>> F.sigmoid_focal_loss(torch.zeros(2, 3), torch.ones(2, 3), reduction="mean")
        tensor(0.0433)
    """
    if has_torch_function((inputs, targets)):
        return handle_torch_function(
            sigmoid_focal_loss, (inputs, targets), inputs, targets, alpha, gamma, reduction
        )
    number = reduction_number(reduction, "sigmoid_focal_loss")
    check_tensor(inputs, "inputs", "sigmoid_focal_loss")
    check_tensor(targets, "targets", "sigmoid_focal_loss")
    check_number(alpha, "alpha", "sigmoid_focal_loss")
    check_number(gamma, "gamma", "sigmoid_focal_loss")
    (inputs,) = autocast("float32", inputs)
    if targets.dtype not in FLOATING:
        raise NotImplementedError(
            "sigmoid_focal_loss: targets must be floating point, as in torchvision, got "
            f"{targets.dtype}; give targets.to(inputs.dtype)"
        )
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    inputs, targets = inputs.to(dtype), targets.to(dtype)
    class_alpha, scalar_alpha = _class_alpha(alpha, inputs)
    gamma = min(gamma, LARGEST_GAMMA)
    if class_alpha is None or (class_alpha.dim() == 1 and not differentiable(class_alpha)):
        return _sigmoid_focal_loss.sigmoid_focal_loss(
            inputs, targets, class_alpha, scalar_alpha, gamma, number
        )
    losses = _sigmoid_focal_loss.sigmoid_focal_loss(inputs, targets, None, -1.0, gamma, NONE)
    weights = class_alpha * targets + (1 - class_alpha) * (1 - targets)
    losses = losses * weights.where(class_alpha >= 0, 1)
    return losses if number == NONE else losses.mean() if number == MEAN else losses.sum()


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax focal loss; with gamma=0, :func:`torch.nn.functional.cross_entropy`.

    With p = softmax(input), the loss of a row with class t is ``-w_t (1 - p_t)^gamma log(p_t)``;
    with class probabilities q as target, or with label smoothing, it is
    ``-sum_c w_c q_c (1 - p_c)^gamma log(p_c)`` (Lin et al., "Focal Loss for Dense Object
    Detection", 2017). Value and gradients are finite at any finite logit and any gamma >= 0.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), floating point.
        target: class indices (int64) in the shape of input without C, or class probabilities in the
            shape of input; another floating-point dtype than input's promotes.
        weight: one weight for each class, (C), of input's dtype.
        gamma: how strongly well-classified rows are played down.
        ignore_index: rows with this class index count for nothing.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; the mean divides by the summed weights of
            the targets, or by the number of rows where the target holds probabilities.
        label_smoothing: this much of the target is spread evenly over the classes.

    Returns:
        A scalar, or with ``"none"`` the losses in the shape of input without C.

    Raises:
        ValueError: an unknown reduction, a target whose shape does not fit input.
        IndexError: a class index out of range.
        RuntimeError: a weight that does not hold C values, label_smoothing outside [0, 1], tensors
            of mixed dtypes or devices, a weight that requires a gradient where the target holds
            class indices.

    Example::

        >>> import torch, dlops.functional as F
        >>> F.focal_loss(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(1.8651)
    """
    if has_torch_function((input, target)):
        return handle_torch_function(
            focal_loss,
            (input, target),
            input,
            target,
            weight=weight,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    number = reduction_number(reduction, "focal_loss")
    check_tensor(input, "input", "focal_loss")
    check_tensor(target, "target", "focal_loss")
    check_number(gamma, "gamma", "focal_loss")
    check_int(ignore_index, "ignore_index", "focal_loss")
    check_number(label_smoothing, "label_smoothing", "focal_loss")
    if target.dtype == torch.uint8:
        target = target.long()
    if input.dim() == 1 and target.dim() == 1 and target.numel() == 1 != input.numel():
        target = target.squeeze(0)  # native takes a single row's class either way
    input, target, weight = autocast("float32", input, target, weight)
    if target.dtype in FLOATING and input.dtype in FLOATING:
        # Class probabilities promote, as in native, where they are a factor like any other.
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
            weight = weight.to(dtype)
        input, target = input.to(dtype), target.to(dtype)
    gamma = min(gamma, LARGEST_GAMMA)
    smoothing = max(label_smoothing, 0.0)  # native, too, reads a negative one as none
    if weight is not None and differentiable(weight):
        weight, target, smoothing = _weight_in_target(input, target, weight, smoothing)
    return _focal_loss.focal_loss(input, target, weight, gamma, ignore_index, number, smoothing)[0]


def class_balanced_weight(
    samples_per_class: Sequence[float] | Tensor, beta: float = 0.9999
) -> Tensor:
    """Class weights by the effective number of samples.

    ``(1 - beta) / (1 - beta^n)`` for a class of n samples, scaled to sum to the number of classes
    (Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019). beta = 0 weights
    all classes alike; as beta goes to 1 the weights go to inverse class frequency.

    Args:
        samples_per_class: the number of training samples of each class, all above 0.
        beta: in [0, 1).

    Returns:
        A float32 tensor of shape (C).

    Raises:
        ValueError: no classes, a count that is not positive or not finite, beta outside [0, 1).

    Example::

        >>> import dlops.functional as F
        >>> F.class_balanced_weight([1000, 100, 10], beta=0.99)
        tensor([0.2369, 0.3737, 2.3894])
    """
    counts = torch.as_tensor(samples_per_class, dtype=torch.float64)
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(
            "class_balanced_weight: samples_per_class must be a non-empty list of counts, "
            f"got shape {tuple(counts.shape)}"
        )
    for index, count in enumerate(counts.tolist()):
        if not (count > 0 and math.isfinite(count)):
            raise ValueError(
                "class_balanced_weight: samples_per_class must be positive and finite, got "
                f"{count:g} for class {index}"
            )
    if not 0 <= beta < 1:
        raise ValueError(f"class_balanced_weight: beta must be in [0, 1), got {beta}")
    if beta == 0:
        return torch.ones(counts.numel())
    # 1 - beta^n without cancellation for beta near 1.
    weights = (1 - beta) / -torch.expm1(counts * math.log(beta))
    return (weights / weights.sum() * counts.numel()).float()


def _batched(input: Tensor, op: str) -> tuple[Tensor, bool]:
    """Images as (N, C, H, W), and whether the caller gave a single one."""
    check_tensor(input, "input", op)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"{op}: expected input of shape (N, C, H, W) or, unbatched, (C, H, W), "
            f"got shape {tuple(input.shape)}"
        )
    return (input.unsqueeze(0), True) if input.dim() == 3 else (input, False)


def _conv_padding(
    padding: Size | str, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """(top, left, bottom, right) of a convolution's padding."""
    if not isinstance(padding, str):
        height, width = pair(padding, "padding", "conv2d")
        return [height, width, height, width]
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding != "same":
        raise RuntimeError(
            f"conv2d: padding must be an int, a pair, 'same' or 'valid', got {padding!r}"
        )
    if any(step != 1 for step in stride):
        raise RuntimeError(f"conv2d: padding='same' needs stride 1, got stride {tuple(stride)}")
    if any(step <= 0 for step in dilation):
        raise RuntimeError(f"conv2d: dilation must be greater than zero, got {list(dilation)}")
    # torch.jit.trace cannot put traced sizes into the lists that the operators take.
    kernel = [int(size) if torch.jit.is_tracing() else size for size in weight.shape[2:]]
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if not all(isinstance(total, torch.SymInt) or fits(total) for total in totals):
        raise RuntimeError(
            f"conv2d: dilation is too large for padding='same' of a {kernel[0]}x{kernel[1]} "
            f"kernel, got {list(dilation)}"
        )
    before = [total // 2 for total in totals]
    # An odd total puts the extra row and column at the end.
    return before + [total - first for total, first in zip(totals, before, strict=True)]


def _window(
    kernel_size: Size, dilation: Size, padding: Size, stride: Size, op: str
) -> tuple[list[int], ...]:
    values = {
        "kernel_size": kernel_size,
        "dilation": dilation,
        "padding": padding,
        "stride": stride,
    }
    return tuple(pair(value, name, op, single=False) for name, value in values.items())


def _weight_in_target(
    input: Tensor, target: Tensor, weight: Tensor, label_smoothing: float
) -> tuple[Tensor | None, Tensor, float]:
    """Weight, target and smoothing, so that a derivative flows to weight where there is one."""
    if not target.is_floating_point():
        if weight.requires_grad or has_tangent(weight):
            raise RuntimeError(_focal_loss.NO_WEIGHT_GRADIENT)
        return weight, target, label_smoothing
    dim = 1 if input.dim() > 1 else 0
    if weight.dim() != 1 or target.shape != input.shape or weight.shape[0] != input.shape[dim]:
        return weight, target, label_smoothing  # the kernel says what is wrong
    weights = weight.view(-1, *[1] * (input.dim() - dim - 1))
    return None, _focal_loss.weighted_target(target, weights, label_smoothing, dim), 0.0


def _class_alpha(alpha: float | Tensor, inputs: Tensor) -> tuple[Tensor | None, float]:
    """alpha as one for each class, or as a number for all."""
    if not isinstance(alpha, Tensor):
        if not alpha <= 1:
            raise ValueError(
                f"sigmoid_focal_loss: alpha must be in [0, 1], or negative for none, got {alpha}"
            )
        return None, alpha
    classes = inputs.shape[-1] if inputs.dim() else 1
    if alpha.dim() > 1 or alpha.numel() not in (1, classes):
        raise RuntimeError(
            f"sigmoid_focal_loss: alpha must hold 1 or {classes} values (inputs' last dimension), "
            f"got shape {tuple(alpha.shape)}"
        )
    per_class = alpha.to(inputs.device) if alpha.dim() == 0 else alpha
    if inputs.dim() == 0:
        return per_class.reshape(()).to(inputs.dtype), 0.0
    return per_class.expand(classes).to(inputs.dtype), 0.0
