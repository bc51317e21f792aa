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
Loss = Callable[..., Tensor]


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


def build_loss(
    impl: str, counts: list[int], device: torch.device, name: str, **arguments: Any
) -> Loss:
    """The loss called ``name``: from logits (N, C) and class indices (N) to each image's loss (N).

    ``counts`` of the training images of each class are for the class-balanced ones.
    """
    if name not in TAKES:
        raise UsageError(f"no loss {name!r}; known: {', '.join(TAKES)}")
    if unknown := sorted(arguments.keys() - TAKES[name]):
        raise UsageError(f"[loss] {name} takes no {', '.join(unknown)}")
    table = _dlops_losses(device) if impl == "dlops" else _torch_losses()
    if not name.startswith("class_balanced"):
        return partial(table[name], **arguments)
    try:
        return table[name](counts, **{"beta": 0.999, "gamma": 2.0} | arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"[loss] {name}: {error}") from None


TAKES: dict[str, set[str]] = {
    "focal": {"gamma"},
    "sigmoid_focal": {"gamma", "alpha"},
    "cross_entropy": set(),
    "class_balanced_softmax": {"beta", "gamma"},
    "class_balanced_sigmoid": {"beta", "gamma"},
}


def _dlops_losses(device: torch.device) -> dict[str, Callable[..., Any]]:
    functional = _dlops().functional
    focal = partial(functional.focal_loss, reduction="none")

    def class_balanced(counts: list[int], form: str, **arguments: Any) -> Loss:
        module = _dlops().nn.ClassBalancedFocalLoss
        return module(counts, reduction="none", form=form, **arguments).to(device)

    return {
        "focal": focal,
        "sigmoid_focal": partial(losses.sum_over_classes, functional.sigmoid_focal_loss),
        "cross_entropy": partial(focal, gamma=0.0),
        "class_balanced_softmax": partial(class_balanced, form="softmax"),
        "class_balanced_sigmoid": partial(class_balanced, form="sigmoid"),
    }


def _torch_losses() -> dict[str, Callable[..., Any]]:
    from torchvision.ops import sigmoid_focal_loss

    focal = partial(losses.focal_loss, reduction="none")
    sigmoid = partial(losses.sum_over_classes, sigmoid_focal_loss)
    return {
        "focal": focal,
        "sigmoid_focal": sigmoid,
        "cross_entropy": partial(F.cross_entropy, reduction="none"),
        "class_balanced_softmax": partial(losses.class_balanced, focal),
        "class_balanced_sigmoid": partial(losses.class_balanced, partial(sigmoid, alpha=-1)),
    }


def _dlops() -> Any:
    try:
        import dlops
        import dlops.functional
        import dlops.nn
    except ImportError as error:
        raise UsageError(
            f"dlops cannot be imported ({error}): run `make train`, or install it with "
            "`pip install --no-build-isolation .`"
        ) from None
    return dlops
