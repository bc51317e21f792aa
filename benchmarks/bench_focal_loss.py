"""Focal losses: the sigmoid form against torchvision, the softmax form against torch operations."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from dlops_examples.losses import focal_loss as eager_focal_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

import dlops.functional

from .harness import Case, Problem, Work

SHAPES = [(128, 10), (65536, 80), (16384, 1000)]
MOST_CLASSES = (512, 200_000)  # of a full run

Loss = Callable[..., Tensor]
# op: native, dlops. Everything is reduced to its mean, as in training.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "sigmoid_focal_loss": (
        partial(sigmoid_focal_loss, reduction="mean"),
        partial(dlops.functional.sigmoid_focal_loss, reduction="mean"),
    ),
    "focal_loss": (eager_focal_loss, dlops.functional.focal_loss),
    "cross_entropy": (F.cross_entropy, partial(dlops.functional.focal_loss, gamma=0.0)),
}


def cases(scope: str, compiled: bool = True) -> Iterator[Case]:
    shapes = {"quick": SHAPES[:1], "full": [*SHAPES, MOST_CLASSES]}.get(scope, SHAPES)
    for op in LOSSES:
        for rows, classes in shapes:
            build = partial(problem, op, rows, classes, compiled)
            yield Case(op, f"{rows}x{classes}", "", build)


def problem(
    op: str, rows: int, classes: int, compiled: bool, device: torch.device, dtype: torch.dtype
) -> Problem:
    logits = torch.randn(rows, classes, device=device, dtype=dtype, requires_grad=True)
    if op == "sigmoid_focal_loss":
        target = (torch.rand(rows, classes, device=device) < 0.05).to(dtype)
    else:
        target = torch.randint(classes, (rows,), device=device)
    native, ours = LOSSES[op]
    contenders = {"native": native, "dlops": ours}
    if compiled:
        torch.compiler.reset()  # shapes of earlier cases would count as recompilations
        contenders["compile"] = torch.compile(native, fullgraph=True, dynamic=False)
    logits_bytes, target_bytes = logits.numel() * dtype.itemsize, target.nbytes
    return Problem(
        contenders=contenders,
        inputs=(logits, target),
        # One pass over the logits suffices for the loss and its gradient.
        work={
            "forward": Work(0, logits_bytes + target_bytes),
            "forward+backward": Work(0, 2 * logits_bytes + target_bytes),
        },
    )
