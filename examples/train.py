"""Train an image classifier on dlops' conv2d, max_pool2d and focal loss.

python examples/train.py                # the default recipe on dlops
python examples/train.py --impl torch   # the identical network on torch.nn, same seed
python examples/train.py --help
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.cli import main

    sys.exit(main())
