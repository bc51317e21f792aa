"""What a study's networks may not exceed, and must have."""

from collections.abc import Sequence

from torch import nn

from ..errors import UsageError
from ..networks import parameter_count

PARAMETER_CAP = 1_000_000


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
