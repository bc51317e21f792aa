"""Converted networks under DistributedDataParallel and DataParallel."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import checks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dlops
from dlops import functional as F

pytestmark = pytest.mark.compose

PROCESSES = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 10),
    )
    return dlops.convert(layers.double())


def batch() -> tuple[Tensor, Tensor]:
    return checks.normal((6, 3, 8, 8)), torch.arange(6)


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    F.focal_loss(model(images), labels).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    images, labels = batch()
    model = DistributedDataParallel(network())
    grads = gradients(model, images[rank::PROCESSES], labels[rank::PROCESSES])
    torch.save(grads, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of a batch each get the gradients of the whole batch."""
    torch.multiprocessing.spawn(work, (free_port(), str(tmp_path)), nprocs=PROCESSES)
    expected = gradients(network(), *batch())
    for rank in range(PROCESSES):
        grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


def test_data_parallel() -> None:
    """Without a GPU it calls the module; tests/gpu runs its replicas."""
    expected = gradients(network(), *batch())
    grads = gradients(nn.DataParallel(network()), *batch())
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


def test_replicas() -> None:
    """What DataParallel makes for each device: shallow copies without parameters of their own."""
    model, images = network(), batch()[0]
    replica = model._replicate_for_data_parallel()
    replica._modules = {
        name: module._replicate_for_data_parallel() for name, module in model.named_children()
    }
    for copy, module in zip(replica.children(), model.children(), strict=True):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(copy, name, parameter.detach())
    assert not list(replica.parameters())
    torch.testing.assert_close(replica(images), model(images), rtol=0, atol=0)
