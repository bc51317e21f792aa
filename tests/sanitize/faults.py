"""Faults on purpose: each must be reported by the sanitizer that dlops was built with.

python tests/sanitize/faults.py overflow | misaligned | race
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import torch

import dlops.functional as F


def overflow() -> None:
    """A tensor that claims more memory than it has."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    # Whole vectors less: of one that is cut, the sanitizer says unknown-crash.
    address = libc.malloc(ctypes.c_size_t(64 * 64 * 4 - 256))
    memory = (ctypes.c_float * (64 * 64)).from_address(address)
    image = torch.from_numpy(np.ctypeslib.as_array(memory)).view(1, 1, 64, 64)
    F.max_pool2d(image, 2)


def misaligned() -> None:
    """Classes that begin in the middle of one."""
    target = torch.frombuffer(bytearray(8 * 64 + 8), dtype=torch.int64, offset=4, count=64)
    F.focal_loss(torch.zeros(64, 3), target)


def race() -> None:
    """Two threads do the same work: with DLOPS_SEEDED_RACE (parallel_threads.h) on that build."""
    F.max_pool2d(torch.zeros(8, 8, 64, 64), 2)


if __name__ == "__main__":
    {"overflow": overflow, "misaligned": misaligned, "race": race}[sys.argv[1]]()
    print("nothing was reported")
