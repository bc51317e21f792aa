"""Arguments for every op, valid and invalid: what a careless or hostile caller may pass.

A drawn `Call` is a description: `Call.tensors()` builds fresh tensors of it each time, so that
nothing that one side does to its arguments reaches the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from checks import generator
from hypothesis import strategies as st
from torch import Tensor

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGER = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
EXOTIC = [torch.bool, torch.complex32, torch.uint16, torch.uint64, torch.float8_e4m3fn]
DTYPES = FLOATING + COMPLEX + INTEGER + EXOTIC

# Past every type that a size may be kept in on the way.
HUGE = [2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-44, 3e-8]
FILLS = ["normal", "integers", "special", "denormal", "extreme"]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "overlapping"]


@dataclass(frozen=True)
class Spec:
    """A tensor: its shape, and how it is filled, laid out and placed."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fill: str = "normal"
    layout: str = "contiguous"
    seed: int = 0
    device: str = "cpu"
    top: int = 0
    """For class indices: how many classes there are."""
    unit: bool = False
    """Between 0 and 1."""
    cast: torch.dtype | None = None
    """What the values, made in `dtype`, are given as."""

    def build(self) -> Tensor:
        if self.device == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        if any(size > 1000 for size in self.shape):  # no memory for it but one element
            return torch.ones((), dtype=torch.float32).to(self.dtype).expand(self.shape)
        values = self.values().to(self.dtype)
        return LAID_OUT[self.layout](values.to(self.cast or self.dtype))

    def values(self) -> Tensor:
        values = self.any_values()
        return values.abs().clamp(max=1) if self.unit else values

    def any_values(self) -> Tensor:
        source = generator(self.seed)
        if self.top:
            return torch.randint(self.top, self.shape, generator=source)
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            low = -3 if self.dtype.is_signed else 0
            return torch.randint(low, 4, self.shape, generator=source)
        if self.fill == "integers":
            return torch.randint(-1, 2, self.shape, generator=source)
        values = torch.randn(self.shape, dtype=torch.float64, generator=source)
        # Which parts of a complex product are infinite depends on the order of its sums.
        if self.fill == "special" and not self.dtype.is_complex:
            chosen = torch.randint(len(SPECIAL), self.shape, generator=source)
            rare = torch.rand(self.shape, generator=source) < 0.2
            values = torch.where(rare, torch.tensor(SPECIAL, dtype=torch.float64)[chosen], values)
        if self.fill == "denormal":
            values = values * torch.finfo(self.dtype).tiny / 4
        if self.fill == "extreme":
            values = values * 2e4
        return values


def expanded(x: Tensor) -> Tensor:
    """Every entry of the first dimension that has several is the same memory."""
    wide = next((i for i, size in enumerate(x.shape) if size > 1), None)
    return x if wide is None else x.narrow(wide, 0, 1).expand_as(x)


def overlapping(x: Tensor) -> Tensor:
    """Neighbours in every dimension share memory: all strides are 1."""
    if x.numel() == 0:
        return x
    memory = x.flatten()
    return memory.as_strided(x.shape, [1] * x.dim())


def sliced(x: Tensor) -> Tensor:
    room = torch.zeros([2 * size + 1 for size in x.shape], dtype=x.dtype)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "sliced": sliced,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": expanded,
    "overlapping": overlapping,
}


@dataclass(frozen=True)
class Call:
    """One call of one op, of torch's signature; `module`: through the class of that name."""

    specs: dict[str, Spec | None]
    arguments: dict[str, Any]
    module: bool = False

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: None if s is None else s.build() for name, s in self.specs.items()}

    def with_spec(self, name: str, **changes: Any) -> Call:
        spec = self.specs[name]
        assert spec is not None
        return replace(self, specs={**self.specs, name: replace(spec, **changes)})

    def with_arguments(self, **changes: Any) -> Call:
        return replace(self, arguments={**self.arguments, **changes})


# ---------------------------------------------------------------------------------------------
# Parts

sizes = st.integers(1, 9)
small = st.integers(1, 4)
seeds = st.integers(0, 1000)
fills = st.sampled_from(["normal", *FILLS])
layouts = st.sampled_from(["contiguous", "channels_last", *LAYOUTS])
dtypes = st.one_of(st.sampled_from(FLOATING), st.sampled_from(FLOATING + COMPLEX + INTEGER))
batches = st.sampled_from([(), (1,), (2,), (3,), (0,)])


def pairs(values: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return st.one_of(values, st.tuples(values, values))


def both(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy[Spec]:
    return st.builds(Spec, st.just(shape), st.just(dtype), fills, layouts, seeds)


# What to put in place of an argument such as stride.
bad_sizes = st.one_of(
    st.sampled_from([0, -1, (), (1,), (1, 2, 3), (0, 1), (1, -2), 1.5, None, "same", "no", True]),
    st.sampled_from(HUGE),
    st.tuples(st.sampled_from([1, 2, *HUGE]), st.sampled_from([1, 2, *HUGE])),
    st.sampled_from([-size for size in HUGE]),
)
bad_numbers = st.sampled_from([0, -1, 1.5, None, float("nan"), float("inf"), 5, 1e300, -1e300])
bad_shapes = st.one_of(
    st.lists(st.integers(0, 3), max_size=6).map(tuple),
    st.permutations([0, 1, 2, 3]).map(tuple),
    st.tuples(
        st.sampled_from([0, 1, 2, 2**31, 2**45, 2**62]),
        st.sampled_from([1, 2, 2**45]),
        st.integers(0, 3),
        st.sampled_from([1, 2, 2**45]),
    ),
)


@st.composite
def spoilt(draw: Any, call: Call) -> Call:
    """The call with an argument or a tensor replaced, and often so invalid."""
    name = draw(st.sampled_from(sorted({*call.specs, *call.arguments})))
    if name in call.arguments:
        value = call.arguments[name]
        is_number = isinstance(value, float) or name in ("gamma", "ignore_index", "groups")
        bad = bad_numbers if is_number else bad_sizes
        if isinstance(value, str) and name == "reduction":
            bad = st.sampled_from(["avg", None, 1, ""])
        return call.with_arguments(**{name: draw(bad)})
    spec = call.specs[name]
    if spec is None:
        spec = Spec(draw(bad_shapes))
        return replace(call, specs={**call.specs, name: spec})
    change = draw(st.sampled_from(["shape", "dtype", "device", "dimension"]))
    if change == "shape":
        return call.with_spec(name, shape=draw(bad_shapes))
    if change == "dtype":
        return call.with_spec(name, dtype=draw(st.sampled_from(DTYPES)))
    if change == "device":
        return call.with_spec(name, device="meta")
    shape = list(spec.shape) or [1]
    shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 7, 2**45]))
    return call.with_spec(name, shape=tuple(shape))


def sometimes_spoilt(valid: st.SearchStrategy[Call]) -> st.SearchStrategy[Call]:
    return st.one_of(valid, valid, valid.flatmap(spoilt))


# ---------------------------------------------------------------------------------------------
# The ops


@st.composite
def valid_conv2d(draw: Any) -> Call:
    kernel, dilation = draw(st.tuples(small, small)), draw(pairs(st.integers(1, 3)))
    stride, padding = draw(pairs(st.integers(1, 4))), draw(pairs(st.integers(0, 4)))
    spread = [d * (k - 1) + 1 for d, k in zip(both(dilation), kernel, strict=True)]
    room = [max(1, s - 2 * p) for s, p in zip(spread, both(padding), strict=True)]
    image = tuple(least + draw(st.integers(0, 7)) for least in room)
    groups, channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(small)
    dtype = draw(dtypes)
    specs: dict[str, Spec | None] = {
        "input": draw(tensor((*draw(batches), channels * groups, *image), dtype)),
        "weight": draw(tensor((outputs * groups, channels, *kernel), dtype)),
        "bias": draw(st.none() | tensor((outputs * groups,), dtype)),
    }
    if draw(st.integers(0, 7)) == 0:
        padding = draw(st.sampled_from(["same", "valid"]))
        stride = 1
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return Call(specs, arguments, draw(st.booleans()))


@st.composite
def valid_unfold(draw: Any) -> Call:
    kernel, dilation = draw(pairs(small)), draw(pairs(st.integers(1, 3)))
    padding, stride = draw(pairs(st.integers(0, 4))), draw(pairs(st.integers(1, 4)))
    spread = [d * (k - 1) + 1 for d, k in zip(both(dilation), both(kernel), strict=True)]
    room = [max(1, s - 2 * p) for s, p in zip(spread, both(padding), strict=True)]
    image = tuple(least + draw(st.integers(0, 7)) for least in room)
    arguments = {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride}
    spec = draw(tensor((*draw(batches), draw(small), *image), draw(dtypes)))
    return Call({"input": spec}, arguments, draw(st.booleans()))


@st.composite
def valid_fold(draw: Any) -> Call:
    call = draw(valid_unfold())
    spec = call.specs["input"]
    assert spec is not None
    *batch, channels, height, width = spec.shape
    names = ("kernel_size", "dilation", "padding", "stride")
    window = zip(*(both(call.arguments[name]) for name in names), (height, width), strict=True)
    counts = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for k, d, p, s, size in window]
    cells = both(call.arguments["kernel_size"])
    shape = (*batch, channels * cells[0] * cells[1], counts[0] * counts[1])
    return call.with_spec("input", shape=shape).with_arguments(output_size=(height, width))


@st.composite
def valid_max_pool2d(draw: Any) -> Call:
    kernel = draw(pairs(st.one_of(small, st.sampled_from([7, 16, 17, 1001]))))
    dilation = draw(pairs(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, min(k // 2, 600))) for k in both(kernel))
    padding = tuple(k // 2 if k > 100 else p for k, p in zip(both(kernel), padding, strict=True))
    if max(both(kernel)) > 100:
        dilation = 1
    spread = [d * (k - 1) + 1 for d, k in zip(both(dilation), both(kernel), strict=True)]
    room = [max(1, s - 2 * p) for s, p in zip(spread, padding, strict=True)]
    image = tuple(least + draw(st.integers(0, 9)) for least in room)
    arguments = {
        "kernel_size": kernel,
        "stride": draw(st.none() | pairs(st.integers(1, 5))),
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
        "return_indices": draw(st.booleans()),
    }
    spec = draw(
        tensor((*draw(batches), draw(st.sampled_from([1, 2, 3, 17])), *image), draw(dtypes))
    )
    return Call({"input": spec}, arguments, draw(st.booleans()))


gammas = st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0, 2.0, 3.7, 10.0]), st.floats(0, 5))
reductions = st.sampled_from(["none", "mean", "sum"])


@st.composite
def valid_sigmoid_focal_loss(draw: Any) -> Call:
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), max_size=4)))
    dtype = draw(st.sampled_from(FLOATING))
    targets = replace(draw(tensor(shape, dtype)), unit=True)
    if draw(st.booleans()):
        targets = replace(targets, top=2, dtype=draw(st.sampled_from([dtype, torch.int64])))
    arguments = {
        "alpha": draw(st.sampled_from([0.25, -1.0, 0.0, 1.0])),
        "gamma": draw(gammas),
        "reduction": draw(reductions),
    }
    specs: dict[str, Spec | None] = {"inputs": draw(tensor(shape, dtype)), "targets": targets}
    return Call(specs, arguments, draw(st.booleans()))


@st.composite
def valid_focal_loss(draw: Any) -> Call:
    classes, dtype = draw(st.sampled_from([1, 2, 3, 10, 17])), draw(st.sampled_from(FLOATING))
    rows = draw(st.sampled_from([(), (1,), (4,), (0,), (33,), (2, 3), (2, 1, 3), (2, 3, 0)]))
    shape = (*rows[:1], classes, *rows[1:])
    logits = draw(tensor(shape, dtype))
    probabilities = draw(st.booleans())
    if probabilities:
        target = replace(draw(tensor(shape, dtype)), unit=True)
    else:
        # One class more than there are: out of range, unless it is ignored.
        top = classes + draw(st.sampled_from([0, 0, 0, 0, 1, 100]))
        target = Spec(rows, draw(st.sampled_from([torch.int64, torch.int64, torch.uint8])), top=top)
        target = replace(target, layout=draw(layouts), seed=draw(seeds))
    weight = draw(st.none() | tensor((classes,), dtype))
    if weight is not None:
        fill = draw(st.sampled_from(["integers", "normal"]))
        weight = replace(weight, fill=fill, unit=True)
    arguments = {
        "gamma": draw(gammas),
        "ignore_index": -100 if probabilities else draw(st.sampled_from([-100, -1, 0, classes])),
        "reduction": draw(reductions),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    specs = {"input": logits, "target": target, "weight": weight}
    return Call(specs, arguments, draw(st.booleans()))


CALLS: dict[str, st.SearchStrategy[Call]] = {
    "conv2d": sometimes_spoilt(valid_conv2d()),
    "max_pool2d": sometimes_spoilt(valid_max_pool2d()),
    "unfold": sometimes_spoilt(valid_unfold()),
    "fold": sometimes_spoilt(valid_fold()),
    "sigmoid_focal_loss": sometimes_spoilt(valid_sigmoid_focal_loss()),
    "focal_loss": sometimes_spoilt(valid_focal_loss()),
}
