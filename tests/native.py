"""What torch and torchvision offer for each op of dlops.functional, under the same names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, fold, max_pool2d, unfold
from torchvision.ops import sigmoid_focal_loss

__all__ = [
    "conv2d",
    "cross_entropy",
    "focal_loss",
    "fold",
    "max_pool2d",
    "sigmoid_focal_loss",
    "unfold",
]


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The softmax focal loss in native operators: what one writes without dlops.

    Neither its value nor its gradient stands extreme logits.
    """
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    dtype = input.dtype
    if target.is_floating_point():  # as their product has
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if target.is_floating_point():
        probability = target
        normalizer = torch.tensor(input.numel() // classes)
    else:
        kept = target != ignore_index
        labels = target.where(kept, 0)
        probability = F.one_hot(labels, classes).movedim(-1, dim) * kept.unsqueeze(dim)
        normalizer = kept.sum() if weight is None else (weight[labels] * kept).sum()
    smooth = (1 - label_smoothing) * probability.to(dtype) + label_smoothing / classes
    if not target.is_floating_point():
        smooth = smooth * kept.unsqueeze(dim)
    if weight is not None:
        smooth = smooth * weight.reshape(-1, *[1] * (input.dim() - dim - 1))
    log_p = input.log_softmax(dim)
    loss = -(smooth * (-log_p.expm1()) ** gamma * log_p).sum(dim)
    loss = loss.to(dtype)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / normalizer}[reduction]
