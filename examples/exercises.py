"""Worked exercises on convolution, pooling, ReLU networks and logistic regression.

python examples/exercises.py
"""

import sys

from dlops_examples.studies.exercises import main

if __name__ == "__main__":
    sys.exit(main())
