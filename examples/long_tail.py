"""Losses compared on long-tailed data: cross entropy, focal, class-balanced focal.

python examples/long_tail.py                             # noisy digits
python examples/long_tail.py --sigma 0                   # clean digits: nothing to be gained
python examples/long_tail.py --data cifar10 --download   # ResNet-32, as published
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.studies.long_tail import main

    sys.exit(main())
