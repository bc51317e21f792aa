"""Loss and confusion matrix of the images a model has seen, summed over batches and processes."""

import torch
from torch import Tensor

from .distributed import Processes


class Tally:
    """Sums on the device, which nobody waits for until they are read."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Losses (N), logits (N, C) and labels (N) of a batch."""
        classes = len(self.confusion)
        self.loss += losses.detach().sum(dtype=torch.float64)
        pairs = labels * classes + logits.detach().argmax(1)
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def reduce(self, processes: Processes) -> "Tally":
        processes.sum(self.loss)
        processes.sum(self.confusion)
        return self

    def mean(self) -> tuple[float, float]:
        """Loss and accuracy per image."""
        seen = self.confusion.sum()
        return (self.loss / seen).item(), (self.confusion.trace() / seen.double()).item()

    def class_accuracy(self) -> list[float | None]:
        """Of each class, the share of its images that were recognised; None where it has none."""
        confusion = self.confusion.cpu()
        pairs = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
        return [correct / seen if seen else None for correct, seen in pairs]
