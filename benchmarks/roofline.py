"""The machine's limits, measured in the same run: a copy's time and the matrix-product rate."""

import time
from functools import cache

import torch

from .timing import Step, time_block


def copying(bytes: float, device: torch.device) -> Step:
    """A copy that reads and writes so many bytes in all. It takes turns with what it is the limit
    of, in blocks as long: alone it would find in the caches what they do not."""
    source = torch.ones(max(1, round(bytes) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Limits:
    """What the device does at best, measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gemm = cache(self._gemm)
        self.measured: dict[str, float] = {}

    def seconds(self, flops: float, copy: float, dtype: torch.dtype) -> float:
        """The least time for so many operations and for what a copy takes so many seconds for:
        the longer of the two."""
        if not flops:
            return copy
        # Numbers of 16 bits may be widened on a CPU whose products of them are slow.
        widened = [torch.float32] if self.device.type == "cpu" and dtype.itemsize == 2 else []
        return max(copy, flops / max(self.gemm(type_) for type_ in (dtype, *widened)))

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
