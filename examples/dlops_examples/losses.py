"""Focal losses in plain torch operations: what --impl torch trains on, and a benchmark baseline."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(
    input: Tensor, target: Tensor, gamma: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """Softmax focal loss of logits (N, C) and class indices (N), https://arxiv.org/abs/1708.02002."""
    log_p = F.log_softmax(input, dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    losses = -((1 - log_p.exp()) ** gamma * log_p)
    return losses if reduction == "none" else losses.mean()


def sum_over_classes(loss: Any, input: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    """Each image's sum (N) of a binary loss over its C classes."""
    one_hot = torch.zeros_like(input).scatter_(1, target.unsqueeze(1), 1)
    return loss(input, one_hot, **arguments).sum(1)


def class_balanced(loss: Any, counts: list[int], beta: float, **arguments: Any) -> Any:
    """``loss`` weighted by the effective number of images of each class, https://arxiv.org/abs/1901.05555."""
    effective = (1 - beta ** torch.tensor(counts, dtype=torch.float64)) / (1 - beta)
    weight = (1 / effective) * (len(counts) / (1 / effective).sum())

    def weighted(input: Tensor, target: Tensor) -> Tensor:
        return weight.to(input)[target] * partial(loss, **arguments)(input, target)

    return weighted
