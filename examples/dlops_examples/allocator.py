"""Let glibc keep freed memory mapped, so that each training step reuses the last one's."""

import os
import sys

# glibc reads these once, when a process starts. Unset, each large tensor is mapped afresh and
# returned on release, and where page faults are slow that costs more than the arithmetic.
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
SWITCH = "DLOPS_KEEP_FREED_MEMORY"


def keep_freed_memory() -> None:
    """Start this command again, once, with SETTINGS in its environment.

    A variable that is already set keeps its value; ``DLOPS_KEEP_FREED_MEMORY=0`` switches this off.
    """
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0":
        return
    if SETTINGS.keys() <= os.environ.keys():
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], SETTINGS | os.environ)
