"""The processes that torchrun started, or this one alone."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UsageError


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def is_first_here() -> bool:
    """Whether this process is the first on its machine."""
    return not started_by_torchrun() or os.environ["LOCAL_RANK"] == "0"


def close() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Processes:
    """Who this process is among ``count``, and what they do together; rank 0 prints and writes."""

    def __init__(self, device: str) -> None:
        self.rank, self.count, self.device = 0, 1, torch.device(device)
        if not started_by_torchrun():
            return
        if self.device.type == "cuda":
            local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= devices:
                raise UsageError(f"torchrun started more processes than the {devices} CUDA devices")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` so that every backward pass averages the gradients over the processes."""
        if self.count == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def synchronised(self, model: nn.Module) -> nn.Module:
        """``model`` with batch norm over all processes' images: only CUDA has a kernel for it."""
        if self.count == 1 or self.device.type != "cuda":
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's batch norm statistics, which it also saves."""
        if self.count > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def first_then_others(self, action: Callable[[], Any]) -> Any:
        """The result of ``action``, which each machine's first process ends before others begin."""
        if self.count == 1:
            return action()
        if not is_first_here():
            distributed.barrier()
        try:
            return action()
        finally:
            if is_first_here():
                distributed.barrier()
