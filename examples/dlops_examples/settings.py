"""How a recipe is run: where, on which kernels, and with which seed."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import UsageError
from .impl import IMPLS


@dataclass(frozen=True)
class Settings:
    impl: str = "dlops"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None  # None: torch's own choice
    amp: str | None = None  # "bf16" trains under autocast
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    limit: int | None = None  # train and test on at most so many images each
    workers: int = 0  # processes that augment images
    root: Path = Path("data")  # where data sets are
    download: bool = False
    tensorboard: bool = False
    resume: bool = False
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        if self.impl not in IMPLS:
            raise UsageError(f"impl must be one of {', '.join(IMPLS)}, got {self.impl!r}")
        for name, least in (("threads", 1), ("limit", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} must be at least {least}, got {value}")
        if not (found := re.fullmatch(r"cpu|cuda(?::(\d+))?", self.device)):
            raise UsageError(f"--device must be cpu, cuda or cuda:N, got {self.device!r}")
        devices = torch.cuda.device_count()
        if self.device != "cpu" and int(found[1] or 0) >= devices:
            raise UsageError(
                f"--device {self.device}: torch {torch.__version__} sees {devices} CUDA devices; "
                "use --device cpu, or check nvidia-smi and that torch is a CUDA build"
            )

    def apply(self) -> None:
        """Make the process-wide settings: threads and determinism."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = not self.deterministic
