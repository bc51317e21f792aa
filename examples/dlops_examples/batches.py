"""Batches of a split: shuffled, augmented, and shared out among processes, all from one seed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """``split`` with random ``augment`` on each image and then ``normalize`` on the batch.

    What is drawn for an image depends on ``seed`` and its index alone, so that neither the batch
    size nor the number of workers or processes changes it.
    """

    def __init__(
        self,
        split: TensorDataset,
        augment: nn.Module | None,
        normalize: nn.Module | None,
        seed: int,
    ) -> None:
        self.images, self.labels = split.tensors
        self.augment, self.normalize, self.seed = augment, normalize, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if self.augment:
            with torch.random.fork_rng(devices=[]):  # dropout goes on with its own numbers
                images = torch.stack([self._augmented(i) for i in indices])
        else:
            images = self.images[indices]
        return (self.normalize(images) if self.normalize else images), self.labels[indices]

    def _augmented(self, index: int) -> Tensor:
        torch.default_generator.manual_seed(self.seed * len(self) + index)
        return self.augment(self.images[index])  # type: ignore[misc]


def order(count: int, batch_size: int, shuffle_seed: int | None) -> list[Tensor]:
    """The indices of every batch; in order without a seed."""
    if shuffle_seed is None:
        return list(torch.arange(count).split(batch_size))
    generator = torch.Generator().manual_seed(shuffle_seed)
    return list(torch.randperm(count, generator=generator).split(batch_size))


class Part(NamedTuple):
    """One process's part of a batch."""

    images: Tensor
    labels: Tensor
    own: int  # how many of these images count: all, or none of the one that stands in for none
    size: int  # of the whole batch


def parts(
    dataset: Augmented,
    batches: list[Tensor],
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Part]:
    """This process's part of every batch; the parts of the processes differ by at most one image.

    A process for which a small last batch has no image gets its first one, which does not count:
    it must take part in the step, and batch norm has no mean of nothing.
    """
    mine = [batch[rank::processes].tolist() for batch in batches]
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=[
            part or batch[:1].tolist() for part, batch in zip(mine, batches, strict=True)
        ],
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
    )
    for (images, labels), part, batch in zip(loader, mine, batches, strict=True):
        yield Part(images, labels, len(part), len(batch))


def _as_it_is(batch: Any) -> Any:
    return batch
