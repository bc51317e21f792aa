"""Slow, obvious versions of every op in NumPy: loops that a reader can check by eye.

They are the oracles of the test suite and a place to learn what each op computes. Nothing here is
fast, and nothing imports torch. Arguments are those of :mod:`dlops.functional`, as NumPy arrays;
images always come in batches ``(N, C, H, W)``. Arithmetic is in float64 (complex128 for complex
arrays).

Letters: N images, C input channels, H x W input, O output channels, R x S kernel, OH x OW output.

>>> import numpy as np
>>> from dlops import reference
>>> image = np.arange(16.0).reshape(1, 1, 4, 4)
>>> reference.conv2d(image, np.ones((1, 1, 3, 3)))
array([[[[45., 54.],
         [81., 90.]]]])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Size = int | Sequence[int]

__all__ = [
    "class_balanced_weight",
    "conv2d",
    "conv2d_backward",
    "focal_loss",
    "focal_loss_backward",
    "fold",
    "max_pool2d",
    "max_pool2d_backward",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_backward",
    "unfold",
]


# ---------------------------------------------------------------------------------------------
# Windows: which input pixel a kernel cell meets at an output pixel.


def _pair(value: Size) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def _floating(values: ArrayLike) -> Array:
    values = np.asarray(values)
    return values.astype(np.result_type(values, np.float64))


class _Axis(NamedTuple):
    """A kernel sliding along one axis of the image."""

    size: int  # of the image
    kernel: int
    stride: int
    before: int  # padding before the first pixel
    after: int  # padding behind the last pixel
    dilation: int

    def outputs(self) -> int:
        """How many places the kernel visits within the padded image."""
        reach = self.dilation * (self.kernel - 1) + 1
        return (self.before + self.size + self.after - reach) // self.stride + 1

    def meetings(self) -> Iterator[tuple[int, int, int]]:
        """Every (output position, kernel cell, input position), leaving the padding out."""
        for out in range(self.outputs()):
            for cell in range(self.kernel):
                at = out * self.stride - self.before + cell * self.dilation
                if 0 <= at < self.size:
                    yield out, cell, at


def _axes(
    image_size: Sequence[int],
    kernel_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
) -> tuple[_Axis, _Axis]:
    kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
    axes = []
    for i in range(2):
        if padding == "same":
            # An odd total puts the extra pixel behind the image.
            total = dilation[i] * (kernel_size[i] - 1)
            before, after = total // 2, total - total // 2
        elif isinstance(padding, str):  # "valid"
            before = after = 0
        else:
            before = after = _pair(padding)[i]
        axes.append(_Axis(image_size[i], kernel_size[i], stride[i], before, after, dilation[i]))
    return axes[0], axes[1]


def _channels(group: int, groups: int, channels: int) -> slice:
    """The channels that belong to a group."""
    size = channels // groups
    return slice(group * size, (group + 1) * size)


# ---------------------------------------------------------------------------------------------
# Convolution


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Array:
    """2-D convolution (strictly, cross-correlation), as ``torch.nn.functional.conv2d``.

    ``input`` is (N, C, H, W), ``weight`` (O, C / groups, R, S), ``bias`` (O) or None; the result is
    (N, O, OH, OW). Each output pixel is the sum, over the kernel's cells and the group's input
    channels, of the input pixel under the cell times the cell's weight.
    """
    input, weight = _floating(input), _floating(weight)
    rows, cols = _axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    out_channels = weight.shape[0]
    shape = (len(input), out_channels, rows.outputs(), cols.outputs())
    output = np.zeros(shape, dtype=np.result_type(input, weight))
    for oh, r, ih in rows.meetings():
        for ow, s, iw in cols.meetings():
            for g in range(groups):
                c = _channels(g, groups, input.shape[1])
                o = _channels(g, groups, out_channels)
                output[:, o, oh, ow] += input[:, c, ih, iw] @ weight[o, :, r, s].T
    if bias is not None:
        output += _floating(bias).reshape(1, -1, 1, 1)
    return output


def conv2d_backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> tuple[Array, Array, Array]:
    """The gradients of ``(conv2d(...) * grad_output).sum()`` for input, weight and bias.

    Wherever the forward pass adds ``input * weight`` to an output pixel, the chain rule adds
    ``grad_output * weight`` to that input pixel and ``grad_output * input`` to that weight.
    """
    grad_output, input, weight = _floating(grad_output), _floating(input), _floating(weight)
    rows, cols = _axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    grad_input, grad_weight = np.zeros_like(input), np.zeros_like(weight)
    for oh, r, ih in rows.meetings():
        for ow, s, iw in cols.meetings():
            for g in range(groups):
                c = _channels(g, groups, input.shape[1])
                o = _channels(g, groups, weight.shape[0])
                grad = grad_output[:, o, oh, ow]
                grad_input[:, c, ih, iw] += grad @ weight[o, :, r, s]
                grad_weight[o, :, r, s] += grad.T @ input[:, c, ih, iw]
    return grad_input, grad_weight, grad_output.sum(axis=(0, 2, 3))


# ---------------------------------------------------------------------------------------------
# im2col and col2im


def unfold(
    input: ArrayLike,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Array:
    """im2col: each window of the image as a column, as ``torch.nn.functional.unfold``.

    (N, C, H, W) becomes (N, C * R * S, OH * OW). Cells in the padding are 0. Convolution is this
    matrix multiplied by the weights as an (O, C * R * S) matrix.
    """
    input = _floating(input)
    n, channels = input.shape[:2]
    rows, cols = _axes(input.shape[2:], kernel_size, stride, padding, dilation)
    shape = (n, channels, rows.kernel, cols.kernel, rows.outputs(), cols.outputs())
    columns = np.zeros(shape, dtype=input.dtype)
    for oh, r, ih in rows.meetings():
        for ow, s, iw in cols.meetings():
            columns[:, :, r, s, oh, ow] = input[:, :, ih, iw]
    return columns.reshape(n, channels * rows.kernel * cols.kernel, rows.outputs() * cols.outputs())


def fold(
    input: ArrayLike,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Array:
    """col2im: sums columns back into an image, as ``torch.nn.functional.fold``.

    (N, C * R * S, OH * OW) becomes (N, C, H, W) with ``output_size`` = (H, W). It is the transpose
    of :func:`unfold`, and so its gradient; a pixel that lies under k windows receives k terms.
    """
    input = _floating(input)
    rows, cols = _axes(_pair(output_size), kernel_size, stride, padding, dilation)
    n, channels = len(input), input.shape[1] // (rows.kernel * cols.kernel)
    shape = (n, channels, rows.kernel, cols.kernel, rows.outputs(), cols.outputs())
    columns = input.reshape(shape)
    image = np.zeros((n, channels, *_pair(output_size)), dtype=input.dtype)
    for oh, r, ih in rows.meetings():
        for ow, s, iw in cols.meetings():
            image[:, :, ih, iw] += columns[:, :, r, s, oh, ow]
    return image


# ---------------------------------------------------------------------------------------------
# Max pooling


def _pool_outputs(axis: _Axis, ceil_mode: bool) -> int:
    if not ceil_mode:
        return axis.outputs()
    # Rounding up is rounding down with stride - 1 more pixels behind the image ...
    outputs = axis._replace(after=axis.after + axis.stride - 1).outputs()
    # ... but the last window must start inside the image or the padding before it.
    if (outputs - 1) * axis.stride >= axis.size + axis.before:
        outputs -= 1
    return outputs


def _window(axis: _Axis, out: int) -> list[int]:
    """The input positions under the kernel at one output position, leaving the padding out."""
    start = out * axis.stride - axis.before
    positions = [start + cell * axis.dilation for cell in range(axis.kernel)]
    return [at for at in positions if 0 <= at < axis.size]


def max_pool2d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> tuple[Array, Array]:
    """The maximum of each window and where it lies, as ``torch.nn.functional.max_pool2d``.

    Returns values (N, C, OH, OW), in the input's dtype, and int64 indices into the H x W plane,
    h * W + w. The first of equal maxima wins, in row-major order; a NaN beats every number, and
    the last NaN wins; padding never wins, not even over -inf.
    """
    input = np.asarray(input)
    n, channels, height, width = input.shape
    stride = kernel_size if stride is None else stride
    rows, cols = _axes((height, width), kernel_size, stride, padding, dilation)
    shape = (n, channels, _pool_outputs(rows, ceil_mode), _pool_outputs(cols, ceil_mode))
    values, indices = np.zeros(shape, dtype=input.dtype), np.zeros(shape, dtype=np.int64)
    for i, c, oh, ow in np.ndindex(shape):
        best = None
        for ih in _window(rows, oh):
            for iw in _window(cols, ow):
                value = input[i, c, ih, iw]
                if best is None or value > best or np.isnan(value):
                    best = value
                    values[i, c, oh, ow] = value
                    indices[i, c, oh, ow] = ih * width + iw
    return values, indices


def max_pool2d_backward(
    grad_output: ArrayLike, indices: ArrayLike, input_size: Sequence[int]
) -> Array:
    """The gradient of ``(max_pool2d(...)[0] * grad_output).sum()``: it goes to the maxima."""
    grad_output, indices = _floating(grad_output), np.asarray(indices)
    n, channels, height, width = input_size
    grad_input = np.zeros((n, channels, height * width))
    for i, c, oh, ow in np.ndindex(grad_output.shape):
        grad_input[i, c, indices[i, c, oh, ow]] += grad_output[i, c, oh, ow]
    return grad_input.reshape(input_size)


# ---------------------------------------------------------------------------------------------
# Focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017): cross-entropy times
# (1 - p) ** gamma, where p is the probability given to the truth.


def _reduce(loss: Array, reduction: str, normalizer: float) -> Array:
    if reduction == "none":
        return loss
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as in torch
        return np.asarray(loss.sum() / (np.float64(normalizer) if reduction == "mean" else 1.0))


def _spread(grad_output: ArrayLike, shape: tuple[int, ...], reduction: str, total: float) -> Array:
    """The gradient that each element's loss receives through the reduction."""
    grad = np.broadcast_to(_floating(grad_output), shape)
    return grad / np.float64(total) if reduction == "mean" else grad


class _SigmoidTerms(NamedTuple):
    p: Array  # sigmoid(x)
    not_p: Array
    cross_entropy: Array
    wrong: Array  # 1 - p_t, the probability given to the wrong answer
    alpha: Array  # the weight of the element
    alpha_slope: Array  # d alpha / d target


def _sigmoid_terms(x: Array, t: Array, alpha: ArrayLike) -> _SigmoidTerms:
    alpha = _floating(alpha)
    p, not_p = np.exp(-np.logaddexp(0, -x)), np.exp(-np.logaddexp(0, x))
    return _SigmoidTerms(
        p=p,
        not_p=not_p,
        # -log p = log(1 + exp(-x)), which logaddexp computes without overflow.
        cross_entropy=t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x),
        wrong=p * (1 - t) + not_p * t,
        alpha=np.where(alpha < 0, 1.0, alpha * t + (1 - alpha) * (1 - t)),
        alpha_slope=np.where(alpha < 0, 0.0, 2 * alpha - 1),
    )


def sigmoid_focal_loss(
    inputs: ArrayLike,
    targets: ArrayLike,
    alpha: ArrayLike = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Array:
    """Sigmoid focal loss of each logit, as ``torchvision.ops.sigmoid_focal_loss``.

    ``alpha_t * (1 - p_t) ** gamma * cross_entropy`` with ``targets`` in [0, 1]. ``alpha`` is a
    number, negative to switch it off, or an array that broadcasts over the last dimension.
    """
    x, t = _floating(inputs), _floating(targets)
    terms = _sigmoid_terms(x, t, alpha)
    loss = terms.alpha * terms.wrong**gamma * terms.cross_entropy
    return _reduce(loss, reduction, loss.size)


def sigmoid_focal_loss_backward(
    grad_output: ArrayLike,
    inputs: ArrayLike,
    targets: ArrayLike,
    alpha: ArrayLike = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> tuple[Array, Array]:
    """The gradients of ``(sigmoid_focal_loss(...) * grad_output).sum()`` for inputs and targets.

    With w = alpha_t, q = 1 - p_t and ce the cross-entropy, the loss is w q^gamma ce, and
    dce/dx = p - t, dq/dx = p (1 - p) (1 - 2 t), dce/dt = -x, dq/dt = 1 - 2 p.
    """
    x, t = _floating(inputs), _floating(targets)
    p, not_p, ce, q, w, dw_dt = _sigmoid_terms(x, t, alpha)
    power = q**gamma
    p_minus_t = p * (1 - t) - not_p * t  # without cancellation
    # d q^gamma = gamma q^gamma (dq / q). Where q underflows to 0 the target is hard and p or 1 - p
    # is q itself, so that these quotients tend to 1.
    safe_q = np.where(q == 0, 1.0, q)
    slope_over_q = np.where(q == 0, 1.0, p * not_p / safe_q)
    ce_over_q = np.where(q == 0, 1.0, ce / safe_q)
    grad_x = w * power * (p_minus_t + gamma * ce * (1 - 2 * t) * slope_over_q)
    grad_t = dw_dt * power * ce + w * power * (-x + gamma * (not_p - p) * ce_over_q)
    grad = _spread(grad_output, x.shape, reduction, x.size)
    return grad * grad_x, grad * grad_t


class _SoftmaxRows(NamedTuple):
    logits: Array  # (rows, C)
    share: Array  # (rows, C): class weight times the target's probability
    share_slope: Array  # (rows, C): d share / d target, for targets that are probabilities
    normalizer: float  # what 'mean' divides by


def _last_to_class(values: Array, class_axis: int) -> Array:
    return np.moveaxis(values, -1, class_axis)


def _rows(values: Array, class_axis: int) -> Array:
    values = np.moveaxis(values, class_axis, -1)
    return values.reshape(-1, values.shape[-1])


def _softmax_rows(
    input: Array,
    target: Array,
    weight: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
) -> _SoftmaxRows:
    class_axis = 0 if input.ndim == 1 else 1
    classes = input.shape[class_axis]
    logits = _rows(input, class_axis)
    weights = np.ones(classes) if weight is None else _floating(weight)
    if np.issubdtype(target.dtype, np.integer):
        labels = target.reshape(-1)
        probability = np.zeros(logits.shape)
        kept = labels != ignore_index
        for row in np.flatnonzero(kept):
            probability[row, labels[row]] = 1.0
        normalizer = sum(weights[label] for label in labels[kept])
    else:
        probability = _rows(_floating(target), class_axis)
        kept = np.ones(len(logits), dtype=bool)
        normalizer = len(logits)
    smooth = (1 - label_smoothing) * probability + label_smoothing / classes
    share = weights * smooth * kept[:, None]
    slope = np.broadcast_to((1 - label_smoothing) * weights, share.shape)
    return _SoftmaxRows(logits, share, slope, float(normalizer))


def _log_softmax(logits: Array) -> tuple[Array, Array]:
    """log p and 1 - p of each class of one row, both without cancellation."""
    top = int(np.argmax(logits))
    shifted = np.exp(logits - logits[top])
    others = np.delete(shifted, top).sum()
    log_p = logits - logits[top] - np.log1p(others)
    p = np.exp(log_p)
    not_p = np.array([np.delete(p, c).sum() for c in range(len(p))])
    return log_p, not_p


def focal_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """Softmax focal loss; with gamma = 0 it is ``torch.nn.functional.cross_entropy``.

    ``input`` holds logits (C), (N, C) or (N, C, d1, ...). ``target`` holds class indices (without
    the C dimension) or class probabilities q (the shape of ``input``). The loss of a row is
    ``-sum_c weight_c q_c (1 - p_c) ** gamma log p_c``, where q is 1 for the target's class, mixed
    with 1 / C in the proportion ``label_smoothing``.
    """
    input, target = _floating(input), np.asarray(target)
    rows = _softmax_rows(input, target, weight, ignore_index, label_smoothing)
    loss = np.zeros(len(rows.logits))
    for row, (logits, share) in enumerate(zip(rows.logits, rows.share, strict=True)):
        log_p, not_p = _log_softmax(logits)
        for c in np.flatnonzero(share):
            loss[row] -= share[c] * not_p[c] ** gamma * log_p[c]
    shape = input.shape[:1] + input.shape[2:] if input.ndim > 1 else ()
    return _reduce(loss.reshape(shape), reduction, rows.normalizer)


def focal_loss_backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Array, Array | None]:
    """The gradients of ``(focal_loss(...) * grad_output).sum()`` for input and target.

    The target's gradient is None for class indices. With v = log p and phi(v) = -(1 - p)^gamma v
    the loss of a row is ``sum_c share_c phi(v_c)``, and dv_c/dx_k = [c = k] - p_k.
    """
    input, target = _floating(input), np.asarray(target)
    rows = _softmax_rows(input, target, weight, ignore_index, label_smoothing)
    loss_shape = input.shape[:1] + input.shape[2:] if input.ndim > 1 else ()
    grad = _spread(grad_output, loss_shape, reduction, rows.normalizer).reshape(-1)
    grad_input, grad_target = np.zeros(rows.logits.shape), np.zeros(rows.logits.shape)
    for row, (logits, share) in enumerate(zip(rows.logits, rows.share, strict=True)):
        log_p, not_p = _log_softmax(logits)
        p = np.exp(log_p)
        for c in np.flatnonzero(share):
            # -log p / (1 - p) tends to 1 as p tends to 1.
            ratio = -log_p[c] / not_p[c] if not_p[c] > 0 else 1.0
            phi_slope = -(not_p[c] ** gamma) * (1 + gamma * p[c] * ratio)
            for k in range(len(p)):
                slope = not_p[c] if c == k else -p[k]
                grad_input[row, k] += grad[row] * share[c] * phi_slope * slope
        grad_target[row] = -grad[row] * rows.share_slope[row] * not_p**gamma * log_p
    class_axis = 0 if input.ndim == 1 else 1
    shape = np.moveaxis(input, class_axis, -1).shape
    grad_input = _last_to_class(grad_input.reshape(shape), class_axis)
    if np.issubdtype(target.dtype, np.integer):
        return grad_input, None
    return grad_input, _last_to_class(grad_target.reshape(shape), class_axis)


def class_balanced_weight(samples_per_class: ArrayLike, beta: float = 0.9999) -> Array:
    """Class weights (1 - beta) / (1 - beta^n), scaled so that they sum to the number of classes.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (2019).
    """
    counts = _floating(samples_per_class)
    with np.errstate(divide="ignore"):  # beta = 0 gives log 0 = -inf, and every weight 1
        # 1 - beta^n = -expm1(n log beta) keeps its digits where beta^n is close to 1.
        weights = 1 / -np.expm1(counts * np.log(np.float64(beta)))
    return weights * len(counts) / weights.sum()
