"""Exponentially imbalanced training sets, and noise."""

import torch
from torch.utils.data import TensorDataset

from .errors import UsageError


def class_counts(largest: int, factor: float, classes: int) -> list[int]:
    """Samples of class i = largest * factor^(i / (classes - 1)), rounded, and at least one.

    Args:
        largest: samples of class 0, the head.
        factor: samples of the last class over those of the first, in (0, 1]: 1/50 or 1/100, say.
    """
    if largest < 1:
        raise UsageError(f"the head class needs at least 1 sample, got {largest}")
    if not 0 < factor <= 1:
        raise UsageError(f"--factor is the last class over the first, in (0, 1], got {factor:g}")
    if classes < 2:
        raise UsageError(f"a long tail needs at least 2 classes, got {classes}")
    return [max(1, round(largest * factor ** (i / (classes - 1)))) for i in range(classes)]


def subsample(split: TensorDataset, counts: list[int], seed: int) -> TensorDataset:
    """``counts[i]`` random samples of each class i of ``split``, drawn from ``seed``."""
    images, labels = split.tensors
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label, count in enumerate(counts):
        indices = (labels == label).nonzero().flatten()
        if len(indices) < count:
            raise UsageError(
                f"class {label} has {len(indices)} training samples, not {count}: "
                "give a smaller --head"
            )
        kept.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
    chosen = torch.cat(kept)
    return TensorDataset(images[chosen], labels[chosen])


def with_noise(split: TensorDataset, sigma: float, seed: int = 0) -> TensorDataset:
    """``split`` with Gaussian noise on its images, always the same noise for the same ``seed``."""
    images, labels = split.tensors
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return TensorDataset(images + sigma * noise, labels)
