"""dlops timed against the native ops: ``python -m benchmarks --help``."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# From the examples: the plain-torch focal loss, the allocator's settings. Tests: the tolerances.
sys.path += [str(_ROOT / "examples"), str(_ROOT / "tests")]
