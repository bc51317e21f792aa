"""No op's errors exceed native's by more than the rounding of another order of summation.

`python -m benchmarks.accuracy` writes the same errors as a table.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy import measure, problems
from cases import ids
from tolerances import DTYPES, allowed_errors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        np.finfo(np.longdouble).nmant < 63, reason="needs a long double of 64 bits of digits"
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_errors_beside_natives(dtype: torch.dtype) -> None:
    worse = []
    for problem in problems(dtype):
        for name, ours, theirs in measure(problem, dtype):
            assert np.isfinite(ours.largest), f"{problem.id}, {name}: NaN or infinity"
            allowed = allowed_errors(theirs)
            if ours.largest > allowed.largest or ours.rms > allowed.rms:
                worse.append(f"{problem.id}, {name}: {ours}, native {theirs}")
    assert not worse, "\n".join(worse)
