"""The peak memory of a call: everything that the process held in memory, as the kernel counts it.

A count of tensors would miss the scratch memory of dlops' own kernels and the buffers inside oneDNN
and MKL. The kernel's high-water mark of resident memory sees all of it. Two things would blur it:
what earlier calls left behind, so every measurement has a forked process of its own, and pages of
code that are read in, so those are subtracted.
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

import dlops.functional

Problem = tuple[Callable[..., Tensor], Sequence[Any]]  # a function and its arguments

ALLOWED_PER_THREAD = 2 * 2**20
"""What dlops may take beyond native, for its panels and tiles: bytes."""

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


def warm_up() -> None:
    """Starts the threads and loads the code of every op, native and ours."""
    torch.ones(1 << 18).add(1)
    for library in (torch.nn.functional, dlops.functional):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout).requires_grad_()
            weight = torch.randn(4, 4, 3, 3, requires_grad=True)
            forward_backward(library.conv2d, (x, weight))
            forward_backward(library.max_pool2d, (x, 2))
        forward_backward(library.unfold, (x, 3))
    logits = torch.randn(8, 4, requires_grad=True)
    forward_backward(torch.nn.functional.cross_entropy, (logits, torch.arange(8) % 4))
    forward_backward(dlops.functional.focal_loss, (logits, torch.arange(8) % 4))


def peak_of_forward_backward(build: Callable[[], Problem]) -> int:
    """Bytes that forward and backward of the problem take beyond its inputs.

    This process must not have started threads of its own before: they do not survive the fork.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_peak(build)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    os.waitpid(child, 0)
    return json.loads(text)


def _peak(build: Callable[[], Problem]) -> int:
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
