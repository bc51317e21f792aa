"""Cases, the check that results agree, and the rows that come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import TOLERANCES, error
from torch import Tensor

from .roofline import Limits
from .timing import Budget, Step, interleave


@dataclass(frozen=True)
class Work:
    """What a pass cannot avoid: floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Problem:
    """A case's tensors, and the contenders that take them; "native" is the reference."""

    contenders: dict[str, Callable[..., Tensor]]
    inputs: Sequence[Tensor]
    work: dict[str, Work]  # by pass: "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    layout: str
    build: Callable[[torch.device, torch.dtype], Problem] = field(repr=False)


class Disagreement(Exception):
    """A contender's result is not native's: it is not timed."""


def forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return step


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> Step:
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> tuple[Tensor, ...]:
        output = function(*inputs)
        return (output, *torch.autograd.grad(output, leaves, grad_output))

    return step


def check(problem: Problem, grad_output: Tensor) -> dict[str, float]:
    """Each contender's largest error in output and gradients, against native in float64.

    None may exceed twice native's own, with the tests' slack for its dtype.
    """
    doubled = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in problem.inputs
    ]
    native = problem.contenders["native"]
    truth = forward_backward(native, doubled, grad_output.double())()

    def errors(function: Callable[..., Tensor]) -> list[float]:
        results = forward_backward(function, problem.inputs, grad_output)()
        return [error(result, true) for result, true in zip(results, truth, strict=True)]

    bounds = [2 * e + TOLERANCES[grad_output.dtype].slack for e in errors(native)]
    found = {}
    for name, function in problem.contenders.items():
        measured = errors(function)
        found[name] = max(measured)
        if any(e > bound for e, bound in zip(measured, bounds, strict=True)):
            raise Disagreement(f"{name}: errors {measured}, allowed {bounds}")
    return found


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, limits: Limits, budget: Budget
) -> list[dict[str, Any]]:
    """Check a case, then time it: one row for each pass."""
    torch.manual_seed(0)
    problem = case.build(device, dtype)
    with torch.no_grad():
        output = problem.contenders["native"](*problem.inputs)
    # Of a loss it is what loss.backward() makes it.
    grad_output = torch.randn_like(output) if output.dim() > 0 else torch.ones_like(output)
    errors = check(problem, grad_output)
    rows = []
    for name, work in problem.work.items():
        steps = {
            contender: forward(function, problem.inputs)
            if name == "forward"
            else forward_backward(function, problem.inputs, grad_output)
            for contender, function in problem.contenders.items()
        }
        times = interleave(steps, device, budget)
        limit = limits.seconds(work.flops, work.bytes, dtype)
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "layout": case.layout,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": name,
                "times": times,
                "errors": errors,
                "flops": work.flops,
                "bytes": work.bytes,
                "limit_s": limit,
                "percent_of_limit": 100 * limit / times["dlops"]["median_s"],
                "speedup": times["native"]["median_s"] / times["dlops"]["median_s"],
            }
        )
    return rows
