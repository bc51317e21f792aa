"""The residual networks for 32x32 images of https://arxiv.org/abs/1512.03385, section 4.2."""

from torch import Tensor, nn
from torch.nn import functional as F

from .common import conv_bn


class Block(nn.Module):
    """Two 3x3 conv/BN beside a shortcut without parameters (the paper's option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, outputs - inputs
        self.branch = nn.Sequential(
            *conv_bn(inputs, outputs, stride=stride), nn.ReLU(), *conv_bn(outputs, outputs)
        )
        self.relu = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        shortcut = input[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return self.relu(self.branch(input) + shortcut)


def resnet(
    channels: int,
    size: int,
    classes: int,
    blocks: int = 5,
    widths: tuple[int, int, int] = (16, 32, 64),
) -> nn.Sequential:
    """6·blocks + 2 layers in three stages, halving the image between them; 5 blocks: ResNet-32."""
    inputs = widths[0]
    layers: list[nn.Module] = [*conv_bn(channels, inputs), nn.ReLU()]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inputs, width, stride=2 if stage and not block else 1))
            inputs = width
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model
