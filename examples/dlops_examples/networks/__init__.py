"""Networks, written in torch.nn alone: impl.place puts them on dlops' kernels.

A builder takes the images' channels, size and number of classes, then its own arguments, and
returns a module from images (N, channels, size, size) to logits (N, classes).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UsageError
from .adam_cnn import adam_cnn
from .compact_cnn import compact_cnn
from .deep_bn import deep_bn
from .lenet_alexnet import lenet_alexnet
from .mlp import mlp
from .mnist_cnn import mnist_cnn
from .one_conv import one_conv
from .resnet import resnet
from .summary import layer_table
from .two_block import two_block

__all__ = ["NETWORKS", "build", "layer_table", "parameter_count"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "one_conv": one_conv,
    "lenet_alexnet": lenet_alexnet,
    "deep_bn": deep_bn,
    "two_block": two_block,
    "adam_cnn": adam_cnn,
    "mnist_cnn": mnist_cnn,
    "resnet": resnet,
    "compact_cnn": compact_cnn,
    "mlp": mlp,
}


def build(name: str, channels: int, size: int, classes: int, **arguments: Any) -> nn.Module:
    if name not in NETWORKS:
        raise UsageError(f"no network {name!r}; known: {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](channels, size, classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"[network] {name}: {error}") from None


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
