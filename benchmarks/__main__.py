"""``python -m benchmarks``: check, time, print, and write the results."""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from benchmarks.run import main

    sys.exit(main())
