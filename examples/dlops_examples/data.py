"""Data sets: in-memory training and test images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from .errors import UsageError


@dataclass(frozen=True)
class Images:
    """Float images (N, C, H, W) in [0, 1] with int64 labels (N), split for training and testing."""

    train: TensorDataset
    test: TensorDataset
    classes: list[str]

    def limited(self, limit: int) -> "Images":
        def head(split: TensorDataset) -> TensorDataset:
            return TensorDataset(*(tensor[:limit] for tensor in split.tensors))

        return Images(head(self.train), head(self.test), self.classes)


def digits(size: int = 28, channels: int = 1) -> Images:
    """scikit-learn's 1,797 handwritten 8x8 digits, resized bilinearly; a fixed 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
    images = images.repeat(1, channels, 1, 1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    # The split never depends on --seed: every run is tested on the same images.
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0
    )
    return Images(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        [str(name) for name in bunch.target_names],
    )


DATASETS: dict[str, Callable[..., Images]] = {"digits": digits}


def load(name: str, **arguments: Any) -> Images:
    if name not in DATASETS:
        raise UsageError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    try:
        return DATASETS[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"[data] {name}: {error}") from None


def batches(split: TensorDataset, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Batches of ``split``: shuffled from ``shuffle_seed``, in order without one.

    A batch is one indexing of the tensors (hence batch_size=None), not a stack of single images.
    """
    if shuffle_seed is None:
        order: RandomSampler | SequentialSampler = SequentialSampler(split)
    else:
        order = RandomSampler(split, generator=torch.Generator().manual_seed(shuffle_seed))
    return DataLoader(split, sampler=BatchSampler(order, batch_size, False), batch_size=None)
