"""MLPs under a budget of hidden units.

python examples/depth_width.py
python examples/depth_width.py --help
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.studies.depth_width import main

    sys.exit(main())
