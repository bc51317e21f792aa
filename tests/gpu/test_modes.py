"""PyTorch's modes on a GPU: autocast, compiled code, DataParallel, as the native ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import native
import pytest
import torch
from tolerances import TOLERANCES, error
from torch import Tensor, nn

import dlops
import dlops.functional as F

pytestmark = [pytest.mark.compose, pytest.mark.gpu]

DEVICE = "cuda"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding="same", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
    ).to(DEVICE)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, device=DEVICE)


def labels() -> Tensor:
    return torch.arange(4, device=DEVICE)


CALLS: dict[str, Callable[[Any, torch.dtype], Tensor]] = {
    "conv2d": lambda o, d: o.conv2d(images().to(d), torch.randn(4, 3, 3, 3, device=DEVICE)),
    "max_pool2d": lambda o, d: o.max_pool2d(images().to(d), 2),
    "unfold": lambda o, d: o.unfold(images().to(d), 2),
    "fold": lambda o, d: o.fold(torch.ones(1, 8, 9, device=DEVICE, dtype=d), (4, 4), 2),
    "sigmoid_focal_loss": lambda o, d: o.sigmoid_focal_loss(
        images().to(d), images().sigmoid().to(d)
    ),
}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast(name: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    with torch.autocast(DEVICE, dtype=autocast):
        assert CALLS[name](F, dtype).dtype == CALLS[name](native, dtype).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_the_softmax_loss(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 10, device=DEVICE, dtype=dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = F.focal_loss(logits, labels(), gamma=0.0)
        theirs = native.cross_entropy(logits, labels())
    assert ours.dtype == theirs.dtype
    # In all digits, where native rounds what it adds up to the logits' dtype.
    truth = native.cross_entropy(logits.double(), labels())
    assert error(ours, truth) <= error(theirs, truth) + TOLERANCES[torch.float32].bound


def step(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = F.focal_loss(model(x), target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = dlops.convert(network())
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        x = images()
        torch.testing.assert_close(
            step(compiled, x, labels()), step(model, x, labels()), rtol=1e-3, atol=1e-4
        )


def test_data_parallel() -> None:
    model, x = dlops.convert(network()), images()
    parallel = nn.DataParallel(model, device_ids=[0])
    torch.testing.assert_close(parallel(x), model(x))
    replicas = nn.parallel.replicate(model, [0])
    torch.testing.assert_close(replicas[0](x), model(x))
