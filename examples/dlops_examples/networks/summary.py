"""A network's layer table."""

from typing import Any

import torch
from torch import Tensor, nn


def layer_table(model: nn.Module, image: Tensor) -> str:
    """One line for each layer that holds parameters or changes the shape.

    ``image`` is a batch (1, C, H, W) on the model's device; the model is left as it was.
    """
    rows = [("layer", "kind", "output", "parameters")]

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            parameters = sum(p.numel() for p in module.parameters())
            if parameters or output.shape != inputs[0].shape:
                shape = "x".join(map(str, output.shape[1:]))
                rows.append((name, type(module).__name__, shape, f"{parameters:,}"))

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in leaves]
    training = model.training
    with torch.no_grad():
        model.eval()(image)
    model.train(training)
    for hook in hooks:
        hook.remove()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:>{widths[2]}}  {count:>{widths[3]}}"
        for name, kind, shape, count in rows
    )
