"""Which library's op does what: every cell of docs/features.md is tried here.

A probe returns if the feature works, with right results, and raises if it does not. What the table
promises must hold, and what it denies the others must be denied. After a change,
``python tests/test_features.py`` tries everything and writes the table anew.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import checks
import native
import pytest
import torch
import torchvision
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import dlops.functional as F

pytestmark = [
    pytest.mark.compose,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

DOCUMENT = Path(__file__).parents[1] / "docs" / "features.md"
LIBRARIES = ("native", "torchvision", "dlops")


class Problem(NamedTuple):
    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]  # its tensor arguments
    differentiable: int = 1  # how many of them, from the first, have a derivative
    kind: str = "images"  # what the first one holds: images, columns or logits


def double(*size: int, seed: int = 0) -> Tensor:
    return checks.normal(size, seed)


IMAGES = double(2, 4, 5, 6)
LOGITS, SOFT = double(4, 5), double(4, 5, seed=1).softmax(1)
LABELS = torch.tensor([1, 2, -100, 4])
CLASSES = double(5, seed=2).abs() + 0.1


def layers(o: Any) -> dict[str, Problem]:
    return {
        "conv2d": Problem(
            lambda x, w, b: o.conv2d(x, w, b, (2, 1), (1, 1), 1, 2),
            (IMAGES, double(6, 2, 3, 2, seed=1), double(6, seed=2)),
            3,
        ),
        "max_pool2d": Problem(lambda x: o.max_pool2d(x, 3, 2, 1), (IMAGES,)),
        "unfold": Problem(lambda x: o.unfold(x, (2, 3), padding=1), (IMAGES,)),
        "fold": Problem(lambda x: o.fold(x, (4, 5), 2), (double(2, 8, 12),), kind="columns"),
    }


def losses(loss: Callable[..., Tensor]) -> dict[str, Problem]:
    return {
        "focal_loss": Problem(loss, (LOGITS, LABELS, CLASSES), kind="logits"),
        "focal_loss (probabilities)": Problem(loss, (LOGITS, SOFT, CLASSES), 3, kind="logits"),
    }


def sigmoid(loss: Callable[..., Tensor]) -> dict[str, Problem]:
    return {"sigmoid_focal_loss": Problem(loss, (LOGITS, SOFT), 2, kind="logits")}


PROBLEMS: dict[str, dict[str, Problem]] = {
    "native": layers(native) | losses(native.cross_entropy),
    "torchvision": sigmoid(torchvision.ops.sigmoid_focal_loss),
    "dlops": layers(F) | losses(F.focal_loss) | sigmoid(F.sigmoid_focal_loss),
}
OPS = list(PROBLEMS["dlops"])


# --------------------------------------------------------------------------------------- probes


class NotSaidOf(Exception):
    """The feature means nothing for this op."""


FEATURES: dict[str, Callable[[Problem], None]] = {}


def feature(name: str) -> Callable[[Callable[[Problem], None]], Callable[[Problem], None]]:
    def add(probe: Callable[[Problem], None]) -> Callable[[Problem], None]:
        FEATURES[name] = probe
        return probe

    return add


def close(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def of_leaves(p: Problem) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The op as a function of what it is differentiable in."""
    leaves = tuple(t.clone().requires_grad_() for t in p.tensors[: p.differentiable])
    return lambda *args: p.function(*args, *p.tensors[p.differentiable :]), leaves


def in_type(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in p.tensors]


def total(p: Problem) -> Callable[[Tensor], Tensor]:
    return lambda x: p.function(x, *p.tensors[1:]).sin().sum()


@feature("gradient (`gradcheck`)")
def _(p: Problem) -> None:
    assert gradcheck(*of_leaves(p))


@feature("second derivative (`gradgradcheck`)")
def _(p: Problem) -> None:
    assert gradgradcheck(*of_leaves(p))


@feature("forward-mode derivative")
def _(p: Problem) -> None:
    assert gradcheck(*of_leaves(p), check_forward_ad=True, check_backward_ad=False)


@feature("forward over reverse")
def _(p: Problem) -> None:
    assert gradgradcheck(
        *of_leaves(p),
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


@feature("batched gradients (`is_grads_batched`)")
def _(p: Problem) -> None:
    assert gradcheck(*of_leaves(p), check_batched_grad=True)


@feature("batched second derivative")
def _(p: Problem) -> None:
    assert gradgradcheck(*of_leaves(p), check_batched_grad=True)


@feature("`torch.func.hessian`")
def _(p: Problem) -> None:
    close(hessian(total(p))(p.tensors[0]), jacrev(jacrev(total(p)))(p.tensors[0]))


@feature("`vmap` over any subset of the tensors")
def _(p: Problem) -> None:
    for mapped in product((False, True), repeat=len(p.tensors)):
        if not any(mapped):
            continue
        stacks = [
            torch.stack([t, t.roll(1, 0)]) if m else t
            for t, m in zip(p.tensors, mapped, strict=True)
        ]
        result = vmap(p.function, tuple(0 if m else None for m in mapped))(*stacks)
        one_by_one = [
            p.function(*(t[i] if m else t for t, m in zip(stacks, mapped, strict=True)))
            for i in range(2)
        ]
        close(result, torch.stack(one_by_one))


@feature("gradient for each sample (`vmap(grad)`)")
def _(p: Problem) -> None:
    stacked = torch.stack([p.tensors[0], p.tensors[0].roll(1, 0)])
    close(vmap(grad(total(p)))(stacked), torch.stack([grad(total(p))(x) for x in stacked]))


def compiled(p: Problem, dynamic: bool) -> None:
    # The graphs are what is asked about; tests/test_compose.py runs Inductor's code.
    torch._dynamo.reset()
    function, leaves = of_leaves(p)
    other = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, theirs = other(*leaves), function(*leaves)
    close(ours, theirs)
    covector = torch.ones_like(theirs)
    close(
        torch.autograd.grad(ours, leaves, covector), torch.autograd.grad(theirs, leaves, covector)
    )


@feature("`torch.compile(fullgraph=True)`, forward and backward")
def _(p: Problem) -> None:
    compiled(p, dynamic=False)


@feature("… with dynamic shapes")
def _(p: Problem) -> None:
    compiled(p, dynamic=True)


class AsModule(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


@feature("`torch.export` and `run_decompositions`")
def _(p: Problem) -> None:
    program = torch.export.export(AsModule(p.function), p.tensors)
    close(program.run_decompositions().module()(*p.tensors), p.function(*p.tensors))


@feature("`torch.jit.trace`, saved and loaded")
def _(p: Problem) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(p.function, p.tensors), file)
    file.seek(0)
    close(torch.jit.load(file)(*p.tensors), p.function(*p.tensors))


@feature("`torch.fx.symbolic_trace`")
def _(p: Problem) -> None:
    f = p.function
    of_so_many = [lambda a: f(a), lambda a, b: f(a, b), lambda a, b, c: f(a, b, c)]
    traced = torch.fx.symbolic_trace(of_so_many[len(p.tensors) - 1])
    close(traced(*p.tensors), p.function(*p.tensors))


@feature("meta tensors")
def _(p: Problem) -> None:
    real, meta = p.function(*p.tensors), p.function(*(t.to("meta") for t in p.tensors))
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@feature("bfloat16 and float16")
def _(p: Problem) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        result = p.function(*in_type(p, dtype))
        assert result.dtype == dtype
        close(result.double(), p.function(*p.tensors), tolerance=0.1)


@feature("complex64 and complex128")
def _(p: Problem) -> None:
    if p.kind == "logits":
        raise NotSaidOf
    for dtype in (torch.complex64, torch.complex128):
        real = p.function(*in_type(p, torch.float64))
        close(p.function(*in_type(p, dtype)).real.double(), real, tolerance=1e-5)


@feature("complex32")
def _(p: Problem) -> None:
    if p.kind == "logits":
        raise NotSaidOf
    result = p.function(*(t.to(torch.complex32) for t in p.tensors))
    close(result.to(torch.complex128).real, p.function(*p.tensors), tolerance=0.02)


@feature("integers")
def _(p: Problem) -> None:
    if p.kind == "logits":
        raise NotSaidOf
    tensors = [t.sign() for t in p.tensors]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        close(p.function(*(t.to(dtype) for t in tensors)).double(), p.function(*tensors))


@feature("autocast to bfloat16")
def _(p: Problem) -> None:
    tensors = in_type(p, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = p.function(*tensors)
    close(result.double(), p.function(*p.tensors), tolerance=0.1)


@feature("channels_last in, channels_last out")
def _(p: Problem) -> None:
    if p.kind != "images" or p.function(*p.tensors).dim() != 4:
        raise NotSaidOf
    first = p.tensors[0].contiguous(memory_format=torch.channels_last)
    result = p.function(first, *p.tensors[1:])
    assert result.is_contiguous(memory_format=torch.channels_last)
    close(result, p.function(*p.tensors))


@feature("strided, expanded and overlapping inputs")
def _(p: Problem) -> None:
    first, *rest = p.tensors
    doubled = first.repeat_interleave(2, -1)[..., ::2]
    overlapping = first.as_strided(first.shape, (1,) * first.dim())
    for view in (doubled, first[..., :1].expand(first.shape), overlapping):
        close(p.function(view, *rest), p.function(view.contiguous(), *rest))


@feature("unbatched input")
def _(p: Problem) -> None:
    first, *rest = p.tensors
    if p.kind == "logits":
        row = [t[:1] if t.shape[:1] == first.shape[:1] else t for t in p.tensors]
        single = [t[0] if t.shape[:1] == first.shape[:1] else t for t in p.tensors]
        close(p.function(*single), p.function(*row).squeeze(0))
    else:
        close(p.function(first[0], *rest), p.function(first, *rest)[0])


@feature("empty batch")
def _(p: Problem) -> None:
    first, *rest = p.tensors
    if p.kind == "logits":
        rest = [t[:0] if t.shape[:1] == first.shape[:1] else t for t in rest]
    x = first[:0].clone().requires_grad_()
    p.function(x, *rest).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@feature("`torch.inference_mode`")
def _(p: Problem) -> None:
    expected = p.function(*p.tensors)
    with torch.inference_mode():
        close(p.function(*p.tensors), expected)


@feature("`torch.utils.checkpoint`, both kinds")
def _(p: Problem) -> None:
    function, leaves = of_leaves(p)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    for reentrant in (False, True):
        again = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
        checkpoint(function, *again, use_reentrant=reentrant).sum().backward()
        close(tuple(leaf.grad for leaf in again), expected)


@feature("saved tensors on the CPU (`save_on_cpu`)")
def _(p: Problem) -> None:
    function, leaves = of_leaves(p)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        result = function(*leaves).sum()
    close(torch.autograd.grad(result, leaves), expected)


class Counted(Tensor):
    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        cls.calls.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@feature("tensor subclasses (`__torch_function__`)")
def _(p: Problem) -> None:
    first, *rest = p.tensors
    Counted.calls.clear()
    result = p.function(first.as_subclass(Counted), *rest)
    assert isinstance(result, Counted)
    assert Counted.calls


def extreme(p: Problem) -> Tensor:
    if p.kind != "logits":
        raise NotSaidOf
    return p.tensors[0].float().sign() * 1e4


@feature("the focal term (`gamma`)")
def _(p: Problem) -> None:
    if p.kind != "logits":
        raise NotSaidOf
    plain, focal = (p.function(*p.tensors, gamma=gamma, reduction="none") for gamma in (0.0, 2.0))
    assert (focal <= plain).all()
    assert (focal < plain).any()


@feature("an `alpha` for each class, with a gradient")
def _(p: Problem) -> None:
    if p.differentiable != 2:
        raise NotSaidOf
    assert gradcheck(lambda alpha: p.function(*p.tensors, alpha), CLASSES.clone().requires_grad_())


@feature("a gradient for the class weights")
def _(p: Problem) -> None:
    if p.differentiable != 3 or p.kind != "logits":
        raise NotSaidOf
    weight = p.tensors[2].clone().requires_grad_()
    assert gradcheck(lambda weight: p.function(*p.tensors[:2], weight), weight)


@feature("finite gradient with `gamma` below 1, at any finite logit")
def _(p: Problem) -> None:
    x, rest = extreme(p).requires_grad_(), in_type(p, torch.float32)[1:]
    rest[0] = (rest[0] > 0.3).float() if rest[0].is_floating_point() else rest[0]
    (first,) = torch.autograd.grad(p.function(x, *rest, gamma=0.5).sum(), x)
    assert first.isfinite().all()


@feature("finite gradient at any finite logit")
def _(p: Problem) -> None:
    x, rest = extreme(p).requires_grad_(), in_type(p, torch.float32)[1:]
    (first,) = torch.autograd.grad(p.function(x, *rest).sum(), x)
    assert first.isfinite().all()


@feature("finite second derivative at any finite logit")
def _(p: Problem) -> None:
    x, rest = extreme(p), in_type(p, torch.float32)[1:]
    assert hessian(lambda x: p.function(x, *rest).sum())(x).isfinite().all()


@feature("same bits on any number of threads")
def _(p: Problem) -> None:
    threads = torch.get_num_threads()
    big = [torch.cat([t] * 64) if t.shape[:1] == p.tensors[0].shape[:1] else t for t in p.tensors]

    def results() -> list[Tensor]:
        x = big[0].clone().requires_grad_()
        value = p.function(x, *big[1:])
        value.sum().backward()
        assert x.grad is not None
        return [value.detach(), x.grad]

    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        assert all(map(torch.equal, results(), one))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------- the document

YES, NO, NONE = "✓", "✗", "-"


def outcome(library: str, op: str, name: str) -> tuple[str, str]:
    """The cell, and why the feature does not work if it does not."""
    problem = PROBLEMS[library].get(op)
    if problem is None:
        return NONE, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FEATURES[name](problem)
    except NotSaidOf:
        return NONE, ""
    except Exception as error:
        return NO, f"{type(error).__name__}: {error}"
    return YES, ""


def anchor(library: str, op: str, name: str) -> str:
    return f"test_feature[{library}-{op}-{name}]"


def table(op: str, cells: Callable[[str, str, str], str]) -> Iterator[str]:
    yield f"\n## {op}\n"
    yield f"| | {' | '.join(LIBRARIES)} |"
    yield "|---" * (len(LIBRARIES) + 1) + "|"
    for name in FEATURES:
        row = [cells(library, op, name) for library in LIBRARIES]
        if row[-1] == NONE:
            continue
        links = (
            cell
            if cell == NONE
            else f"[{cell}](../tests/test_features.py '{anchor(library, op, name)}')"
            for library, cell in zip(LIBRARIES, row, strict=True)
        )
        yield f"| {name} | {' | '.join(links)} |"


def committed() -> dict[tuple[str, str, str], str]:
    """The document's cells."""
    cells = {}
    op = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            op = line[3:]
        elif line.startswith("| ") and not line.startswith("| |"):
            name, *row = (part.strip() for part in line.strip("|").split(" | "))
            for library, cell in zip(LIBRARIES, row, strict=True):
                cells[library, op, name.strip()] = cell.lstrip("[")[0]
    return cells


CELLS = committed() if DOCUMENT.exists() else {}
TRIED = re.search(r"torch (\S+)", DOCUMENT.read_text()) if DOCUMENT.exists() else None


@pytest.mark.parametrize(
    ("library", "op", "name"), [key for key, cell in CELLS.items() if cell != NONE]
)
def test_feature(library: str, op: str, name: str) -> None:
    if library != "dlops" and (TRIED is None or not torch.__version__.startswith(TRIED[1])):
        pytest.skip("the table was made with another version of torch")
    cell, why = outcome(library, op, name)
    assert cell == CELLS[library, op, name], why


def test_the_document_is_complete() -> None:
    said = {(op, name) for library, op, name in CELLS}
    assert {op for op, _ in said} == set(OPS)
    assert {name for _, name in said} == set(FEATURES)
    ours = {key for key, cell in CELLS.items() if key[0] == "dlops" and cell == YES}
    behind = [(op, name) for (_, op, name), cell in CELLS.items() if cell == YES]
    assert all(("dlops", op, name) in ours for op, name in behind)


HEADER = """# What works with what

Every cell is tried by a test, which its link names: {yes} works, with right results; {no} does not;
{none} there is no such op (softmax focal loss is compared with `cross_entropy`, which is its case
gamma=0). `python tests/test_features.py` tries everything again and writes this page. Tried with
torch {torch} and torchvision {torchvision} on the CPU.

Compiled code (Inductor, AOTInductor), hooks, pruning, parametrizations and files are shown by
[test_compose.py](../tests/test_compose.py), whole networks by
[test_networks.py](../tests/test_networks.py), DataParallel and DistributedDataParallel by
[test_distributed.py](../tests/test_distributed.py). CUDA graphs, autocast, compiled
code and DataParallel on a GPU are in [tests/gpu](../tests/gpu);
[GPU.md](../benchmarks/results/GPU.md) says what of that has run.
"""


def main() -> None:
    reasons = []

    def tried(library: str, op: str, name: str) -> str:
        cell, why = outcome(library, op, name)
        if why:
            reasons.append(f"{library} {op}: {name}: {why[:300]}")
        return cell

    lines = [line for op in OPS for line in table(op, tried)]
    header = HEADER.format(
        yes=YES,
        no=NO,
        none=NONE,
        torch=torch.__version__.partition("+")[0],
        torchvision=torchvision.__version__.partition("+")[0],
    )
    DOCUMENT.write_text(header + "\n".join(lines) + "\n")
    print("\n".join(reasons), file=sys.stderr)


if __name__ == "__main__":
    main()
