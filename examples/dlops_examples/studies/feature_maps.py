"""Which image regions excite a feature map: Grad-CAM on single channels, one figure a layer."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import files, grad_cam
from ..errors import UsageError
from ..recipes import Recipe
from ..trainer import Trainer
from .study import Study, Table, command, parser

SHOWN = 2  # images for each channel


def build_parser() -> argparse.ArgumentParser:
    result = parser("feature_maps.py", __doc__ or "", ("digits", "mnist", "cifar10"))
    add = result.add_argument
    add("--recipe", default="digits_cnn", help="what is trained first (default: digits_cnn)")
    add("--checkpoint", type=Path, help="last.pt or best.pt of train.py or a study, instead")
    add("--layers", nargs="+", help="their names (default: three, first to last convolution)")
    add("--channels", nargs="+", type=int, help="default: three with the largest gradients")
    add("--images", type=int, default=100, help="test images to choose from (default: 100)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return command("feature_maps", build_parser(), run, arguments)


def run(study: Study) -> None:
    options = study.options
    if options.images < SHOWN:
        raise UsageError(f"--images must be at least {SHOWN}, got {options.images}")
    trainer = checkpoint(study) if options.checkpoint else trained(study)
    images, labels = (tensor[: options.images] for tensor in trainer.images.test.tensors)
    layers = options.layers or grad_cam.spread(grad_cam.convolutions(trainer.model), 3)
    normalized = trainer.normalize(images) if trainer.normalize else images
    found, predicted = grad_cam.layer_maps(trainer.model, normalized.to(trainer.device), layers)
    rows, pictures = [], {}
    for number, (name, maps) in enumerate(found.items(), 1):
        channels = options.channels or maps.top_channels(3)
        if max(channels) >= maps.weight.shape[1] or min(channels) < 0:
            raise UsageError(f"layer {name} has channels 0 to {maps.weight.shape[1] - 1}")
        chosen = {channel: maps.top_images(channel, SHOWN) for channel in channels}
        classes = [trainer.images.classes[i] for i in predicted.tolist()]
        pictures[f"layer{number}.png"] = figure(name, maps, chosen, images, classes)
        rows += [row(name, maps, chosen, channel, classes, labels) for channel in channels]
    headers = ["layer", "maps", "channel", "images", "predicted", "labels", "gradients"]
    study.finish({"maps": Table(headers, rows)}, pictures)


def trained(study: Study) -> Trainer:
    """--recipe's network after its training."""
    name = study.options.recipe
    trainer = study.trainer(Path(name).stem, study.recipe(name), study.options.seed)
    study.fit(trainer)
    return trainer


def checkpoint(study: Study) -> Trainer:
    """The network of --checkpoint, and the data that its recipe names."""
    path = study.options.checkpoint
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}: train.py and the studies write last.pt, best.pt")
    state = files.load_checkpoint(path, torch.device("cpu"))
    recipe = Recipe(**state["identity"]["recipe"], epochs=1)
    trainer = study.trainer("checkpoint", recipe, study.options.seed)
    trainer.model.load_state_dict(state["model"])
    return trainer


def row(
    name: str,
    maps: grad_cam.LayerMaps,
    chosen: dict[int, list[int]],
    channel: int,
    classes: list[str],
    labels: Tensor,
) -> list[Any]:
    size = "x".join(map(str, maps.activation.shape[1:]))
    indices = chosen[channel]
    columns = (
        [str(i) for i in indices],
        [classes[i] for i in indices],
        [str(labels[i].item()) for i in indices],
        [f"{maps.weight[i, channel]:.2g}" for i in indices],
    )
    return [name, size, channel, *(", ".join(column) for column in columns)]


def figure(
    name: str,
    maps: grad_cam.LayerMaps,
    chosen: dict[int, list[int]],
    images: Tensor,
    classes: list[str],
) -> Figure:
    """A line of images for each channel: image, and its heat map laid over it, for each image."""
    result = Figure(figsize=(2 * 2 * SHOWN, 2.2 * len(chosen)), layout="constrained")
    panels = result.subplots(len(chosen), 2 * SHOWN, squeeze=False)
    for line, (channel, indices) in zip(panels, chosen.items(), strict=True):
        for plain, overlaid, i in zip(line[::2], line[1::2], indices, strict=True):
            picture = images[i].permute(1, 2, 0).clamp(0, 1)
            heat = maps.heat_map(i, channel, tuple(images.shape[2:]))
            for panel in (plain, overlaid):
                panel.imshow(picture, cmap="gray", vmin=0, vmax=1)
                panel.axis("off")
            overlaid.imshow(heat.cpu(), cmap="inferno", alpha=0.6)
            plain.set_title(f"image {i}, as {classes[i]}", fontsize="small")
            overlaid.set_title(
                f"channel {channel}, {maps.weight[i, channel]:.2g}", fontsize="small"
            )
    result.suptitle(f"layer {name}: activation x gradient of one channel")
    return result
