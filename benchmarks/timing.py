"""Interleaved timing of steps that compete."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Step = Callable[[], Any]
BLOCK_SECONDS = 2e-3  # calls shorter than this are timed several at a time


@dataclass(frozen=True)
class Budget:
    seconds: float  # for each pass of each case
    min_rounds: int


def time_block(step: Step, number: int, device: torch.device) -> float:
    """Seconds a call, over ``number`` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / number
    begin = time.perf_counter()
    for _ in range(number):
        step()
    return (time.perf_counter() - begin) / number


def captured(step: Step) -> Step:
    """The step as a CUDA graph: what is timed is the device's work, not the host's calls, which
    take longer than most layers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is planned or compiled once cannot be captured
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def interleave(steps: dict[str, Step], device: torch.device, budget: Budget) -> dict[str, Any]:
    """Time the steps in turn, A B A B ..., so that drift of the machine falls on all alike."""
    if device.type == "cuda":
        steps = {name: captured(step) for name, step in steps.items()}
    numbers, round_seconds = {}, 0.0
    for name, step in steps.items():
        time_block(step, 2, device)  # plans, compiles and warms the caches
        seconds = time_block(step, 1, device)
        numbers[name] = max(1, math.ceil(BLOCK_SECONDS / seconds))
        round_seconds += seconds * numbers[name]
    rounds = max(budget.min_rounds, min(1000, int(budget.seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                samples[name].append(time_block(step, numbers[name], device))
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return {"median_s": median, "iqr_s": high - low, "rounds": len(samples)}


def keep_pages_mapped(bytes: int = 1 << 30) -> None:
    """Fault memory in once and free it, so that no timing pays for fresh pages.

    It stays mapped under the allocator's settings of examples/dlops_examples/allocator.py.
    """
    torch.zeros(bytes, dtype=torch.uint8)
