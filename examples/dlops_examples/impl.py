"""The two implementations: dlops' kernels, and the same network and losses on torch.nn."""

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import losses
from .errors import UsageError

IMPLS = ("dlops", "torch")
Loss = Callable[[Tensor, Tensor], Tensor]


def place(model: nn.Module, impl: str) -> nn.Module:
    """``model`` on the kernels of ``impl``, with the parameters that it has."""
    if impl == "torch":
        return model
    model = _dlops().convert(model)
    native = [name for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.MaxPool2d)]
    assert not native, f"--impl dlops would train on torch.nn layers: {', '.join(native)}"
    return model


def versions(impl: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | ({"dlops": _dlops().__version__} if impl == "dlops" else {})


def build_loss(impl: str, name: str, **arguments: Any) -> Loss:
    """The loss called ``name``, a function of logits (N, C) and class indices (N)."""
    table = _dlops_losses() if impl == "dlops" else _torch_losses()
    if name not in table:
        raise UsageError(f"no loss {name!r}; known: {', '.join(table)}")
    takes = {"focal": {"gamma"}, "sigmoid_focal": {"gamma", "alpha"}, "cross_entropy": set[str]()}
    if unknown := sorted(arguments.keys() - takes[name]):
        raise UsageError(f"[loss] {name} takes no {', '.join(unknown)}")
    return partial(table[name], **arguments)


def _dlops_losses() -> dict[str, Callable[..., Tensor]]:
    functional = _dlops().functional

    def sigmoid_focal(input: Tensor, target: Tensor, **arguments: float) -> Tensor:
        targets = losses.one_hot(target, input)
        return losses.sum_over_classes(functional.sigmoid_focal_loss(input, targets, **arguments))

    return {
        "focal": functional.focal_loss,
        "sigmoid_focal": sigmoid_focal,
        "cross_entropy": partial(functional.focal_loss, gamma=0.0),
    }


def _torch_losses() -> dict[str, Callable[..., Tensor]]:
    from torchvision.ops import sigmoid_focal_loss

    def sigmoid_focal(input: Tensor, target: Tensor, **arguments: float) -> Tensor:
        targets = losses.one_hot(target, input)
        return losses.sum_over_classes(sigmoid_focal_loss(input, targets, **arguments))

    return {
        "focal": losses.focal_loss,
        "sigmoid_focal": sigmoid_focal,
        "cross_entropy": F.cross_entropy,
    }


def _dlops() -> Any:
    try:
        import dlops
        import dlops.functional
    except ImportError as error:
        raise UsageError(
            f"dlops cannot be imported ({error}): run `make train`, or install it with "
            "`pip install --no-build-isolation .`"
        ) from None
    return dlops
