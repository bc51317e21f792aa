"""The one table of tolerances, by dtype, and the comparison that uses it.

Truth is the native op in float64 on the same (already rounded) inputs. Errors are relative to the
truth's largest magnitude, so that sums which cancel do not count as wrong digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far a result in one dtype may lie from the truth."""

    bound: float
    """The largest error at all."""
    slack: float
    """What an error may exceed twice native's by: a lucky native result has an error of 0."""
    elementwise: float
    """The largest error of one element relative to itself, where a formula loses no digits."""


TOLERANCES = {
    # Here native is the truth itself, with an error of 0.
    torch.float64: Tolerance(bound=1e-14, slack=1e-14, elementwise=1e-13),
    torch.float32: Tolerance(bound=4e-6, slack=5e-7, elementwise=2e-5),
    # One rounding of the result (2^-11 and 2^-8) and a little for what came before it.
    torch.float16: Tolerance(bound=6e-4, slack=1e-4, elementwise=2e-3),
    torch.bfloat16: Tolerance(bound=4.5e-3, slack=8e-4, elementwise=1.6e-2),
}

DTYPES = list(TOLERANCES)


def comparable(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """On one device in double precision, where any two results can be compared."""
    return x.detach().to(device, torch.complex128 if x.is_complex() else torch.float64)


def error(result: Tensor, truth: Tensor, magnitude: float = 0.0) -> float:
    """The largest deviation, relative to the truth's largest magnitude, or to `magnitude` where the
    truth's terms are that large and cancel.

    Below the smallest normal number a dtype has fewer digits, so that is the least to relate to.
    """
    smallest = torch.finfo(result.dtype).smallest_normal
    device = truth.device  # large tensors are not moved for nothing
    result, truth = comparable(result, device), comparable(truth, device)
    # NaN and infinities must stand in the same places; what is finite is measured.
    finite = truth.isfinite()
    torch.testing.assert_close(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    deviation, scale = (result - truth)[finite].abs(), truth[finite].abs()
    if deviation.numel() == 0:
        return 0.0
    return (deviation.max() / scale.max().clamp(min=max(smallest, magnitude))).item()


def assert_accurate(
    ours: Tensor, native: Tensor, truth: Tensor, what: str, magnitude: float = 0.0
) -> None:
    """Ours is within the table's bound of the truth, and at most twice as far from it as native."""
    assert ours.dtype == native.dtype, f"{what}: dtype {ours.dtype}, native {native.dtype}"
    assert ours.shape == native.shape, f"{what}: {tuple(ours.shape)}, native {tuple(native.shape)}"
    tolerance = TOLERANCES[ours.dtype]
    our_error, native_error = (error(x, truth, magnitude) for x in (ours, native))
    allowed = min(tolerance.bound, 2 * native_error + tolerance.slack)
    assert our_error <= allowed, (
        f"{what} in {ours.dtype}: error {our_error:.3g}, native's {native_error:.3g}, "
        f"allowed {allowed:.3g}"
    )


def assert_elementwise(result: Tensor, truth: Tensor, what: str, dtype: torch.dtype) -> None:
    """Every element has the digits its dtype can hold, however small it is."""
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(
        comparable(result),
        comparable(truth),
        rtol=TOLERANCES[dtype].elementwise,
        atol=2 * smallest,
        equal_nan=True,
        msg=lambda text: f"{what} in {dtype}: {text}",
    )


class Errors(NamedTuple):
    """Of one result, in units of its dtype's epsilon times the largest sum of magnitudes in it."""

    largest: float
    rms: float


def allowed_errors(native: Errors) -> Errors:
    """What ours may be where native's are these: the rounding of another order of summation."""
    return Errors(2 * native.largest + 1, 1.5 * native.rms + 0.6)
