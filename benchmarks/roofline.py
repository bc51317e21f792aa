"""The machine's limits, measured in the same run: copy bandwidth and matrix-product rate."""

import time
from functools import cache

import torch

from .timing import Step, time_block

MIN_BYTES, MAX_BYTES = 1 << 16, 1 << 28


class Limits:
    """What the device does at best, measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bandwidth = cache(self._bandwidth)
        self.gemm = cache(self._gemm)
        self.measured: dict[str, float] = {}

    def seconds(self, flops: float, bytes: float, dtype: torch.dtype) -> float:
        """The least time for so many operations and bytes: the longer of the two."""
        # A copy of the same size: small cases live in caches that are faster than memory.
        size = 1 << max(0, round(bytes) - 1).bit_length()
        at_memory = bytes / self.bandwidth(min(max(size, MIN_BYTES), MAX_BYTES))
        if not flops:
            return at_memory
        # Numbers of 16 bits may be widened on a CPU whose products of them are slow.
        widened = [torch.float32] if self.device.type == "cpu" and dtype.itemsize == 2 else []
        return max(at_memory, flops / max(self.gemm(type_) for type_ in (dtype, *widened)))

    def _bandwidth(self, bytes: int) -> float:
        """Bytes read and written a second by a copy that moves ``bytes`` in all."""
        source = torch.ones(bytes // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate = bytes / self._best(lambda: target.copy_(source))
        self.measured[f"copy of {bytes} bytes, GB/s"] = rate / 1e9
        return rate

    def _gemm(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of a square matrix product, at best.

        On the CPU it is asked of both libraries that torch has for it: which one is far from the
        machine's limit depends on the machine (MKL takes its AVX2 path on an AMD CPU).
        """
        n = 8192 if self.device.type == "cuda" else 2048
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        steps: dict[str, Step] = {"product": lambda: torch.mm(a, b)}
        if self.device.type == "cpu":
            image = a.view(1, 1, n, n).permute(0, 3, 1, 2)  # channels_last: each row a pixel
            weight = b.view(n, n, 1, 1)
            steps["1x1 convolution"] = lambda: torch.conv2d(image, weight)
        rates = {name: 2 * n**3 / self._best(step) for name, step in steps.items()}
        for name, rate in rates.items():
            kind = f"{n}x{n} {str(dtype).removeprefix('torch.')} {name}"
            self.measured[f"{kind}, GFLOP/s"] = rate / 1e9
        return max(rates.values())

    def _best(self, step: Step) -> float:
        time_block(step, 2, self.device)
        number = max(1, int(1e-3 / max(time_block(step, 1, self.device), 1e-7)))
        end = time.perf_counter() + 0.5
        best = time_block(step, number, self.device)
        while time.perf_counter() < end:
            best = min(best, time_block(step, number, self.device))
        return best
