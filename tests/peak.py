"""The peak memory of a call: everything that the process held in memory, as the kernel counts it.

A count of tensors would miss the scratch memory of dlops' own kernels and the buffers inside oneDNN
and MKL. The kernel's high-water mark of resident memory sees all of it. Two things would blur it: what
earlier calls left behind, so every measurement has a forked process of its own, and pages of code
that are read in, so those are subtracted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Problem = tuple[Callable[..., Tensor], Sequence[Any]]  # a function and its arguments

# glibc would otherwise keep freed tensors, the more the longer the process runs.
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status(*names: str) -> list[int]:
    """Fields of /proc/self/status, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(fields[name].split()[0]) for name in names]


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
    output = function(*inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def peak_of_forward_backward(build: Callable[[], Problem], warm_up: Callable[[], None]) -> int:
    """Bytes that forward and backward of the problem take beyond its inputs.

    `warm_up` runs first: it loads code and starts threads. This process must not have started
    threads of its own before, since they do not survive the fork.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_peak(build, warm_up)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    os.waitpid(child, 0)
    return json.loads(text)


def _peak(build: Callable[[], Problem], warm_up: Callable[[], None]) -> int:
    libc = ctypes.CDLL(None)
    huge_pages_off = 41  # PR_SET_THP_DISABLE: a huge page is resident where one byte is used
    libc.prctl(huge_pages_off, 1, 0, 0, 0)
    warm_up()
    function, inputs = build()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    resident, code = status("VmRSS", "RssFile")
    forward_backward(function, inputs)
    mark, code_after = status("VmHWM", "RssFile")
    return mark - resident - (code_after - code)
