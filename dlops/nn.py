"""Modules with the constructors, attributes and state_dict keys of ``torch.nn``, on dlops' kernels.

Conv2d, MaxPool2d, Unfold and Fold are subclasses of torch's modules, so that code that looks for
those (weight initialisation, parametrisation, pruning) finds them; only their forward differs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlops import functional as F

__all__ = [
    "ClassBalancedFocalLoss",
    "Conv2d",
    "FocalLoss",
    "Fold",
    "LazyConv2d",
    "MaxPool2d",
    "SigmoidFocalLoss",
    "Unfold",
]


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on dlops' kernels: same arguments, initialisation and state_dict.

    Shapes: input (N, C, H, W) or (C, H, W), output (N, O, OH, OW) or (O, OH, OW). See
    :func:`dlops.functional.conv2d` for dtypes and errors.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.Conv2d(3, 16, 3, padding="same")(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class LazyConv2d(nn.LazyConv2d):
    """:class:`torch.nn.LazyConv2d`: a :class:`Conv2d` that takes in_channels from its first input.

    Example::

        >>> import torch, dlops.nn as nn
        >>> conv = nn.LazyConv2d(16, 3)
        >>> conv(torch.ones(1, 5, 8, 8)).shape, type(conv).__name__, conv.in_channels
        (torch.Size([1, 16, 6, 6]), 'Conv2d', 5)
    """

    cls_to_become = Conv2d


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on dlops' kernels.

    Shapes: input (N, C, H, W) or (C, H, W), output (N, C, OH, OW) or (C, OH, OW). See
    :func:`dlops.functional.max_pool2d` for dtypes and errors.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.MaxPool2d(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class Unfold(nn.Unfold):
    """:class:`torch.nn.Unfold` (im2col) on dlops' kernels; see :func:`dlops.functional.unfold`.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.Unfold(3)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 27, 36])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(nn.Fold):
    """:class:`torch.nn.Fold` (col2im) on dlops' kernels; see :func:`dlops.functional.fold`.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.Fold(8, 3)(torch.ones(1, 27, 36)).shape
        torch.Size([1, 3, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.fold(
            input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        )


class SigmoidFocalLoss(nn.Module):
    """Focal loss for independent binary labels; see :func:`dlops.functional.sigmoid_focal_loss`.

    Args:
        alpha: weight of the targets 1; negative for no weighting; a tensor for one per class.
        gamma: how strongly well-classified elements are played down.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.SigmoidFocalLoss(reduction="mean")(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(0.0433)
    """

    alpha: float | Tensor

    def __init__(
        self, alpha: float | Tensor = 0.25, gamma: float = 2.0, reduction: str = "none"
    ) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            # Moves with the module, but is a setting rather than state.
            self.register_buffer("alpha", alpha, persistent=False)
        else:
            self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        F.reduction_number(reduction, "SigmoidFocalLoss")

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class FocalLoss(nn.Module):
    """Softmax focal loss; see :func:`dlops.functional.focal_loss`.

    Args:
        weight: one weight for each class, (C).
        gamma: how strongly well-classified rows are played down; 0 is cross entropy.
        ignore_index: rows with this class index count for nothing.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: this much of the target is spread evenly over the classes.

    Like :class:`torch.nn.CrossEntropyLoss`, it keeps ``weight`` as a buffer.

    Example::

        >>> import torch, dlops.nn as nn
        >>> nn.FocalLoss(gamma=2.0)(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(1.8651)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        F.reduction_number(reduction, type(self).__name__)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.focal_loss(
            input,
            target,
            self.weight,
            self.gamma,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
        )


class ClassBalancedFocalLoss(FocalLoss):
    """Focal loss weighted by the effective number of samples of each class.

    The weights are :func:`dlops.functional.class_balanced_weight` (Cui et al., "Class-Balanced Loss
    Based on Effective Number of Samples", 2019).

    Args:
        samples_per_class: the number of training samples of each class, all above 0.
        beta: in [0, 1); 0 weights all classes alike, near 1 by inverse frequency.
        gamma: how strongly well-classified rows are played down.
        ignore_index, label_smoothing: as in :class:`FocalLoss`; the softmax form only.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        form: ``"softmax"``: :class:`FocalLoss` with these weights. ``"sigmoid"``, the paper's own:
            a sample's C sigmoid focal terms, weighted by its label's weight, summed over classes
            and (with ``"mean"``) averaged over the batch.

    The target is a class index for each row.

    Raises:
        ValueError: counts that are not positive, beta outside [0, 1), an unknown form or reduction.

    Example::

        >>> import torch, dlops.nn as nn
        >>> loss = nn.ClassBalancedFocalLoss([1000, 100, 10], beta=0.99)
        >>> loss(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
        tensor(0.4883)
    """

    weight: Tensor

    def __init__(
        self,
        samples_per_class: Sequence[float] | Tensor,
        beta: float = 0.9999,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        form: str = "softmax",
    ) -> None:
        weight = F.class_balanced_weight(samples_per_class, beta)
        super().__init__(weight, gamma, ignore_index, reduction, label_smoothing)
        if form not in ("softmax", "sigmoid"):
            raise ValueError(
                f"ClassBalancedFocalLoss: form must be 'softmax' or 'sigmoid', got {form!r}"
            )
        if form == "sigmoid" and label_smoothing != 0:
            raise ValueError(
                "ClassBalancedFocalLoss: label_smoothing needs form='softmax', "
                f"got {label_smoothing} with form='sigmoid'"
            )
        self.beta = beta
        self.form = form

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.form == "softmax":
            weight = self.weight.to(input.dtype)
            if torch.is_autocast_enabled(input.device.type) and weight.dtype != torch.float64:
                weight = weight.float()
            return F.focal_loss(
                input,
                target,
                weight,
                self.gamma,
                self.ignore_index,
                self.reduction,
                self.label_smoothing,
            )
        return self._sigmoid_form(input, target)

    def _sigmoid_form(self, input: Tensor, target: Tensor) -> Tensor:
        classes = self.weight.numel()
        if input.dim() not in (1, 2) or input.shape[-1] != classes:
            raise ValueError(
                f"ClassBalancedFocalLoss: form='sigmoid' needs input of shape (N, {classes}) or "
                f"({classes}), got {tuple(input.shape)}"
            )
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"ClassBalancedFocalLoss: expected target of shape {tuple(input.shape[:-1])}, "
                f"got {tuple(target.shape)}"
            )
        kept = target != self.ignore_index
        labels = target.where(kept, 0)
        onehot = nn.functional.one_hot(labels, classes).to(input.dtype)
        terms = F.sigmoid_focal_loss(input, onehot, alpha=-1.0, gamma=self.gamma).sum(-1)
        losses = terms * self.weight.to(terms.dtype)[labels] * kept
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / kept.sum() if self.reduction == "mean" else total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}, form={self.form!r}"
