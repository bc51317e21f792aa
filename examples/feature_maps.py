"""The image regions that excite single feature maps of a network.

python examples/feature_maps.py                                    # trains digits_cnn first
python examples/feature_maps.py --recipe resnet32
python examples/feature_maps.py --checkpoint runs/digits_cnn-dlops/best.pt
"""

import sys

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch
    from dlops_examples.studies.feature_maps import main

    sys.exit(main())
