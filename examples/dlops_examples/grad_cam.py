"""Which regions of an image excite one feature map: Grad-CAM on single channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UsageError


@dataclass(frozen=True)
class LayerMaps:
    """What one layer computed for N images, and what it meant for the predicted class's score."""

    activation: Tensor  # (N, C, H, W)
    weight: Tensor  # (N, C): the score's gradient, averaged over each map (Grad-CAM's alpha)

    def top_channels(self, count: int) -> list[int]:
        """The channels with the largest weight on any image, largest first."""
        return self.weight.amax(0).topk(count).indices.tolist()

    def top_images(self, channel: int, count: int) -> list[int]:
        """The images on which ``channel`` has its largest weight, largest first."""
        return self.weight[:, channel].topk(count).indices.tolist()

    def heat_map(self, image: int, channel: int, size: tuple[int, int]) -> Tensor:
        """Activation times weight of that one channel, enlarged to ``size``: (H, W).

        Only what speaks for the predicted class is kept, as in Grad-CAM (ReLU).
        """
        product = self.activation[image, channel] * self.weight[image, channel]
        enlarged = F.interpolate(product[None, None], size, mode="bilinear", align_corners=False)
        return enlarged[0, 0].relu()


def convolutions(model: nn.Module) -> list[str]:
    """Names of the convolution layers, from input to output."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of ``names``, evenly spaced from the first to the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def layer_maps(
    model: nn.Module, images: Tensor, layers: Sequence[str]
) -> tuple[dict[str, LayerMaps], Tensor]:
    """Run ``model`` on ``images`` (N, C, H, W) once, and differentiate each predicted score.

    Args:
        layers: names of modules (as in ``model.named_modules()``) whose output is (N, C, H, W).

    Returns:
        The maps of each layer, and the predicted classes (N).

    Raises:
        UsageError: a name that the model does not have, or a layer without feature maps.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name not in modules]:
        raise UsageError(
            f"no layer {', '.join(unknown)}; convolutions: {', '.join(convolutions(model))}"
        )
    outputs: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()  # an in-place ReLU that follows must not change what is kept

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    model.eval()
    try:
        with torch.enable_grad():
            # A gradient is asked for at the maps, also where the parameters are frozen.
            scores, predicted = model(images.detach().requires_grad_()).max(1)
            gradients = torch.autograd.grad(scores.sum(), [outputs[name] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if outputs[name].dim() != 4:
            shape = tuple(outputs[name].shape)
            raise UsageError(f"layer {name} has no feature maps: its output is {shape}")
    return {
        name: LayerMaps(outputs[name].detach(), gradient.mean((2, 3)))
        for name, gradient in zip(layers, gradients, strict=True)
    }, predicted
