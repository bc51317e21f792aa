"""Focal loss in plain torch operations: what --impl torch trains on, and a benchmark baseline."""

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(input: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean softmax focal loss of logits (N, C) and class indices (N), https://arxiv.org/abs/1708.02002."""
    log_p = F.log_softmax(input, dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def sum_over_classes(loss: Tensor) -> Tensor:
    """A sample's loss is the sum of its C binary terms; the batch's is the mean over samples."""
    return loss.sum(dim=1).mean()


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1)
