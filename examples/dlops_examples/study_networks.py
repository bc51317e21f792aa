"""Networks that only the studies use, written in torch.nn alone as those of networks.py."""

import itertools
from collections.abc import Sequence

from torch import nn

from .errors import UsageError
from .networks import NETWORKS, parameter_count

PARAMETER_CAP = 1_000_000


def mlp(
    channels: int, size: int, classes: int, units: Sequence[int] = (100,), dropout: float = 0.0
) -> nn.Sequential:
    """Linear, ReLU and dropout for each hidden layer, then a linear layer of logits.

    The softmax is part of the loss, which is exact where a softmax layer's logarithm is not.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise([channels * size**2, *units]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear([channels * size**2, *units][-1], classes))


def compact_cnn(channels: int, size: int, classes: int) -> nn.Sequential:
    """Two conv/BN/ReLU/max-pool blocks, the first with stride 2: small enough for many runs."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (((size + 1) // 2) // 4) ** 2, classes),
    )


NETWORKS.update(mlp=mlp, compact_cnn=compact_cnn)


def check_budget(units: Sequence[int], budget: int, layers: int) -> None:
    """Refuse an MLP with more than ``budget`` hidden units, or less than ``layers`` of them."""
    if len(units) < layers:
        raise UsageError(f"a budget of {budget} asks for {layers} hidden layers, got {len(units)}")
    if min(units) < 1:
        raise UsageError(f"every hidden layer needs a unit, got {list(units)}")
    if sum(units) > budget:
        raise UsageError(f"{list(units)} are {sum(units)} hidden units, the budget is {budget}")


def check_mnist_cnn(model: nn.Module) -> None:
    """Refuse a million parameters and more, and a network without dropout or batch norm."""
    if (count := parameter_count(model)) >= PARAMETER_CAP:
        raise UsageError(f"the network has {count:,} parameters, the cap is {PARAMETER_CAP:,}")
    for kind in (nn.Dropout, nn.BatchNorm2d):
        if not any(isinstance(module, kind) for module in model.modules()):
            raise UsageError(f"the network has no {kind.__name__}; at least one is asked for")
