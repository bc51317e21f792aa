"""Tensors whose memory ends, or begins, beside a page that nobody may touch: a kernel that reads
one element too far stops the process. Sanitizers do not see masked vector loads; this does."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
FORBIDDEN, READ_WRITE, PRIVATE_ANONYMOUS = 0, 3, 0x22  # of Linux


@contextmanager
def guarded(tensor: Tensor, at_end: bool) -> Iterator[Tensor]:
    """A copy of a dense tensor, with its strides, between two such pages, up against the last one
    or the first one. It must not be used afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = tensor.numel() * tensor.element_size()
    room = -(-size // PAGE) * PAGE
    base = libc.mmap(None, room + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), "no memory"
    try:
        for page in (base, base + PAGE + room):
            assert libc.mprotect(page, PAGE, FORBIDDEN) == 0
        start = base + PAGE + (room - size if at_end else 0)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        copy = torch.from_numpy(raw).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        yield copy.copy_(tensor)
    finally:
        libc.munmap(base, room + 2 * PAGE)
