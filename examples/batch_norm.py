"""Learning rates with batch normalisation and without.

python examples/batch_norm.py
python examples/batch_norm.py --help
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.studies.batch_norm import main

    sys.exit(main())
