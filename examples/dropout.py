"""Test accuracy over dropout probabilities, and a full run at the best.

python examples/dropout.py
python examples/dropout.py --help
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.studies.dropout import main

    sys.exit(main())
