"""Exercises 2 and 6: what ReLU networks compute, and what stops them from learning."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlops.functional import sigmoid_focal_loss

from .check import Check, at_least, equal

INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
NEGATIVES = POSITIVES = 500


def three_layers(x: Tensor) -> Tensor:
    """The network of exercise 2: x (1) to h (1)."""
    w1, b1 = torch.tensor([[1.5], [0.5]]), torch.tensor([0.0, 1.0])
    w2, b2 = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([0.0, 1.0])
    w3, b3 = torch.tensor([[1.0, 1.0]]), torch.tensor([-1.0])
    return w3 @ (w2 @ (w1 @ x + b1).relu() + b2).relu() + b3


def linear_map(network: Callable[[Tensor], Tensor], x: float) -> tuple[float, float, float]:
    """h, and the W and b with which network(x') = W x' + b for every x' near x."""
    point = torch.tensor([x])
    h = network(point)
    slope = torch.autograd.functional.jacobian(network, point)
    return h.item(), slope.item(), (h - slope @ point).item()


def local_linear_map() -> list[Check]:
    expected = {2.0: (15.0, 6.0, 3.0), -1.0: (1.5, 1.5, 3.0), 1.0: (9.0, 6.0, 3.0)}
    return [
        equal(f"(h, W, b) around x = {x:g}", linear_map(three_layers, x), answer)
        for x, answer in expected.items()
    ]


def logical_or(x: Tensor) -> Tensor:
    """One hidden unit, which fires only on (0, 0)."""
    return 1 - (1 - x.sum(-1)).relu()


def logical_xor(x: Tensor) -> Tensor:
    """One hidden layer of two units: the sum, and twice what it exceeds one by."""
    total = x.sum(-1)
    return total.relu() - 2 * (total - 1).relu()


def binary_cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """It is the sigmoid focal loss without its focus (gamma) and its class weight (alpha)."""
    return sigmoid_focal_loss(logits, labels, alpha=-1.0, gamma=0.0, reduction=reduction)


def trained_from_zero(activation: nn.Module, labels: Tensor, steps: int = 200) -> nn.Sequential:
    """A 2-4-1 network whose parameters all start at zero, after ``steps`` of gradient descent.

    Gradients of the last step are left in place.
    """
    network = nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for _ in range(steps):
        optimizer.zero_grad()
        binary_cross_entropy(network(INPUTS)[:, 0], labels).backward()
        optimizer.step()
    return network


def dead_units(shuffled: bool, units: int = 64, seed: int = 0) -> tuple[int, float]:
    """Train ReLU units, each to tell 500 negatives from 500 positives; one example a step.

    The examples are numbers around -1/2 and 1/2. Every unit starts with bias 1 and a small random
    weight, active on all of them. Sorted, the negatives come first, and a unit that they push below
    zero for good gets no gradient from any positive.

    Returns:
        How many of the units are zero on every example at the end, and the share of right answers.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.zeros(NEGATIVES), torch.ones(POSITIVES)])
    x = labels - 0.5 + 0.2 * torch.rand(len(labels), generator=generator) - 0.1
    weight = (0.5 * torch.randn(units, generator=generator)).requires_grad_()
    bias = torch.ones(units, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.02)
    order = torch.randperm(len(x), generator=generator) if shuffled else torch.arange(len(x))
    for i in order.tolist():
        logits = 4 * (weight * x[i] + bias).relu() - 2
        optimizer.zero_grad()
        binary_cross_entropy(logits, labels[i].expand(units), "sum").backward()
        optimizer.step()
    with torch.no_grad():
        activation = (x.unsqueeze(1) * weight + bias).relu()  # examples, units
    right = ((activation > 0.5) == (labels == 1).unsqueeze(1)).float().mean()
    return int((activation == 0).all(0).sum()), right.item()


def logic_and_learning() -> list[Check]:
    return [*_logic(), *_zero_weights(), *_order_of_examples()]


def _logic() -> list[Check]:
    return [
        equal("OR of 00, 01, 10, 11", logical_or(INPUTS).tolist(), [0, 1, 1, 1]),
        equal("XOR of 00, 01, 10, 11", logical_xor(INPUTS).tolist(), [0, 1, 1, 0]),
    ]


def _zero_weights() -> list[Check]:
    labels = logical_or(INPUTS)
    relu, sigmoid = (trained_from_zero(kind, labels) for kind in (nn.ReLU(), nn.Sigmoid()))
    largest = max(
        tensor.abs().max().item()
        for layer in (relu[0], relu[2])
        for tensor in (layer.weight, layer.weight.grad)
    )
    weight = sigmoid[0].weight
    return [
        equal("ReLU, trained from zero weights: largest weight and gradient", largest, 0.0),
        equal(
            "sigmoid, trained from zero weights: all units alike",
            bool((weight == weight[0]).all()),
            True,
        ),
        at_least("though they did move: largest weight", weight.abs().max().item(), 0.1),
    ]


def _order_of_examples() -> list[Check]:
    (sorted_dead, _), (shuffled_dead, right) = dead_units(False), dead_units(True)
    return [
        at_least("dead of 64 units, 500 negatives before 500 positives", sorted_dead, 1),
        equal("dead of 64 units, the same examples shuffled", shuffled_dead, 0),
        at_least("share of right answers, shuffled", right, 0.95),
    ]
