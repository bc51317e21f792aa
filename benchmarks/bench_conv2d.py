"""conv2d: the layers of the example networks and of ResNet-18."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import dlops.functional

from .harness import Case, Problem, Work
from .layouts import LAYOUTS

BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Layer:
    network: str
    in_channels: int
    out_channels: int
    image: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    batches: tuple[int, ...] = (32,)  # of the default run
    gpu_batches: tuple[int, ...] = ()  # of the same on a GPU, which smaller ones leave idle

    def name(self, batch: int) -> str:
        text = (
            f"{self.network} {batch}x{self.in_channels}x{self.image}x{self.image}"
            f" to {self.out_channels}, {self.kernel}x{self.kernel}"
        )
        for letter, value, usual in (("s", self.stride, 1), ("p", self.padding, 0)):
            text += f" {letter}{value}" if value != usual else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")


LAYERS = [
    Layer("mnist_cnn", 1, 32, 28, 3, padding=1, gpu_batches=(256,)),
    Layer("mnist_cnn", 32, 32, 28, 3, padding=1),
    Layer("mnist_cnn", 32, 64, 14, 3, padding=1),
    Layer("mnist_cnn", 64, 64, 14, 3, padding=1, batches=(1, 32)),
    Layer("scratch", 3, 32, 32, 5, padding=2, gpu_batches=(256,)),
    Layer("vanilla", 3, 32, 32, 7, batches=(128,)),
    Layer("lenet_alexnet", 3, 64, 32, 3, batches=(128,)),
    Layer("lenet_alexnet", 64, 128, 15, 3, batches=(128,)),
    Layer("lenet_alexnet", 128, 256, 6, 3, batches=(128,)),
    Layer("lenet_alexnet", 256, 64, 4, 1, batches=(128,)),
    Layer("deep_bn", 3, 32, 32, 7, padding=3, batches=()),
    Layer("deep_bn", 32, 64, 15, 3, padding=1, batches=()),
    Layer("deep_bn", 64, 128, 15, 3, stride=2, padding=1, batches=(128,)),
    Layer("deep_bn", 128, 128, 8, 3, padding=1, batches=(128,)),
    Layer("deep_bn", 256, 512, 4, 3, stride=2, padding=1, batches=()),
    Layer("deep_bn", 512, 512, 2, 3, padding=1, batches=(128,)),
    Layer("deep_bn", 1024, 1024, 1, 3, padding=1, batches=()),
    Layer("adam_cnn", 32, 32, 32, 3, padding=1, batches=()),
    Layer("adam_cnn", 64, 64, 16, 3, padding=1, batches=()),
    Layer("resnet32", 3, 16, 32, 3, padding=1, batches=()),
    Layer("resnet32", 16, 16, 32, 3, padding=1, batches=(128,), gpu_batches=(256,)),
    Layer("resnet32", 16, 32, 32, 3, stride=2, padding=1, batches=()),
    Layer("resnet32", 32, 32, 16, 3, padding=1, batches=(128,)),
    Layer("resnet32", 64, 64, 8, 3, padding=1, batches=(128,)),
    Layer("resnet18", 3, 64, 224, 7, stride=2, padding=3, batches=(8,), gpu_batches=(128,)),
    Layer("resnet18", 64, 64, 56, 3, padding=1, batches=(1, 8), gpu_batches=(8, 128)),
    Layer("resnet18", 64, 128, 56, 3, stride=2, padding=1, batches=(), gpu_batches=(128,)),
    Layer("resnet18", 64, 128, 56, 1, stride=2, batches=(8,), gpu_batches=(128,)),
    Layer("resnet18", 128, 128, 28, 3, padding=1, batches=(8,), gpu_batches=(128,)),
    Layer("resnet18", 256, 256, 14, 3, padding=1, batches=(8,), gpu_batches=(8, 128)),
    Layer("resnet18", 512, 512, 7, 3, padding=1, batches=(1, 8), gpu_batches=(128,)),
    Layer("depthwise", 64, 64, 28, 3, padding=1, groups=64, gpu_batches=(256,)),
]


def cases(scope: str, on_gpu: bool = False) -> Iterator[Case]:
    layers = LAYERS[:1] if scope == "quick" else LAYERS
    for layer in layers:
        usual = layer.gpu_batches if on_gpu else layer.batches
        for batch in BATCHES if scope == "full" else usual:
            for layout in LAYOUTS:
                build = partial(problem, layer, batch, layout)
                yield Case("conv2d", layer.name(batch), layout, build)


def problem(
    layer: Layer, batch: int, layout: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    def tensor(*shape: int, requires_grad: bool = True) -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=dtype)
        if len(shape) == 4:
            values = values.contiguous(memory_format=LAYOUTS[layout])
        return values.requires_grad_(requires_grad)

    # A network's first layer sees images, which need no gradient.
    of_images = layer.in_channels <= 3
    image = tensor(batch, layer.in_channels, layer.image, layer.image, requires_grad=not of_images)
    group_channels = layer.in_channels // layer.groups
    weight = tensor(layer.out_channels, group_channels, layer.kernel, layer.kernel)
    bias = tensor(layer.out_channels)
    geometry: dict[str, Any] = {
        "stride": layer.stride,
        "padding": layer.padding,
        "groups": layer.groups,
    }

    size = (layer.image + 2 * layer.padding - layer.kernel) // layer.stride + 1
    outputs = batch * layer.out_channels * size**2
    flops = 2 * outputs * group_channels * layer.kernel**2
    once = image.numel() + weight.numel() + bias.numel() + outputs
    twice = 2 * once - (image.numel() if of_images else 0)
    return Problem(
        contenders={
            "native": partial(F.conv2d, **geometry),
            "dlops": partial(dlops.functional.conv2d, **geometry),
        },
        inputs=(image, weight, bias),
        work={
            "forward": Work(flops, once * dtype.itemsize),
            "forward+backward": Work(flops * (2 if of_images else 3), twice * dtype.itemsize),
        },
    )
