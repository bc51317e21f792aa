"""Cases, the check that results agree, and the rows that come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import TOLERANCES, error
from torch import Tensor

from .roofline import Limits, copying
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


# In float64 native is the truth, and gradients of weights are sums of 100,000 terms and more, whose
# roundings are its own as well. The tests' sums are shorter.
SLACK = {torch.float64: 1e-13}
# Of float32 whose products need not be float32's: of which native makes what use it likes.
HIGH_SLACK = {"cuda": 2e-3, "cpu": 3e-5}


def slack_of(problem: Problem, grad_output: Tensor) -> float:
    dtype = grad_output.dtype
    multiplies = any(work.flops for work in problem.work.values())
    if multiplies and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return HIGH_SLACK[grad_output.device.type]
    return SLACK.get(dtype, TOLERANCES[dtype].slack)


def check(problem: Problem, grad_output: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Each contender's largest error in output and gradients, against native in float64, and what
    there is to say against those that err.

    None may exceed twice native's own and the slack, mostly the tests' for its dtype.
    """
    slack = slack_of(problem, grad_output)
    doubled = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in problem.inputs
    ]
    native = problem.contenders["native"]
    searches, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    truth = forward_backward(native, doubled, grad_output.double())()
    torch.backends.cudnn.benchmark = searches  # the truth is not timed

    def errors(function: Callable[..., Tensor]) -> list[float]:
        results = forward_backward(function, problem.inputs, grad_output)()
        return [error(result, true) for result, true in zip(results, truth, strict=True)]

    bounds = [2 * e + slack for e in errors(native)]
    found, wrong = {}, {}
    for name, function in problem.contenders.items():
        measured = errors(function)
        found[name] = max(measured)
        if any(e > bound for e, bound in zip(measured, bounds, strict=True)):
            wrong[name] = f"{name}: errors {measured}, allowed {bounds}"
    return found, wrong


def grad_output_for(problem: Problem) -> Tensor:
    with torch.no_grad():
        output = problem.contenders["native"](*problem.inputs)
    # Of a loss it is what loss.backward() makes it.
    return torch.randn_like(output) if output.dim() > 0 else torch.ones_like(output)


def time_passes(
    problem: Problem, grad_output: Tensor, device: torch.device, budget: Budget
) -> dict[str, dict[str, Any]]:
    """Each contender's times, by pass, and those of a "copy" of as many bytes."""
    return {
        name: interleave(
            {
                contender: forward(function, problem.inputs)
                if name == "forward"
                else forward_backward(function, problem.inputs, grad_output)
                for contender, function in problem.contenders.items()
            }
            | {"copy": copying(work.bytes, device)},
            device,
            budget,
        )
        for name, work in problem.work.items()
    }


def result(
    case: Case,
    dtype: torch.dtype,
    name: str,
    work: Work,
    limits: Limits,
    copy: dict[str, float],
    **measured: Any,
) -> dict[str, Any]:
    """The row of one pass; `measured`: times and errors."""
    limit = limits.seconds(work.flops, copy["median_s"], dtype)
    ours, native = (measured["times"][side]["median_s"] for side in ("dlops", "native"))
    return {
        "op": case.op,
        "case": case.name,
        "layout": case.layout,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": name,
        **measured,
        "flops": work.flops,
        "bytes": work.bytes,
        "copy": copy,
        "limit_s": limit,
        "percent_of_limit": 100 * limit / ours,
        "speedup": native / ours,
    }


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, limits: Limits, budget: Budget
) -> list[dict[str, Any]]:
    """Check a case, then time it: one row for each pass."""
    torch.manual_seed(0)
    problem = case.build(device, dtype)
    grad_output = grad_output_for(problem)
    errors, wrong = check(problem, grad_output)
    if wrong:
        raise Disagreement("; ".join(wrong.values()))
    rows = []
    for name, times in time_passes(problem, grad_output, device, budget).items():
        copy, work = times.pop("copy"), problem.work[name]
        rows.append(result(case, dtype, name, work, limits, copy, times=times, errors=errors))
    return rows
