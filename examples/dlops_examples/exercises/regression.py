"""Exercise 7: logistic regression is convex."""

import torch
from torch import Tensor

from .check import Check, at_least, at_most
from .relu import binary_cross_entropy


def hessian_formula(x: Tensor, weight: Tensor) -> Tensor:
    """XᵀPX(1-P), with P the diagonal of the predicted probabilities; x (N, D), weight (D)."""
    p = (x @ weight).sigmoid()
    return x.T @ (x * (p * (1 - p)).unsqueeze(1))


def hessian() -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x[:, 5] = x[:, 0] - 2 * x[:, 1]  # one redundant feature: the smallest eigenvalue is zero
    labels = torch.randint(2, (40,), generator=generator).double()

    def loss(weight: Tensor) -> Tensor:
        return binary_cross_entropy(x @ weight, labels, "sum")

    smallest, deviation = float("inf"), 0.0
    for scale in torch.logspace(-2, 2, 100).tolist():
        weight = scale * torch.randn(6, generator=generator, dtype=torch.float64)
        formula = hessian_formula(x, weight)
        smallest = min(smallest, torch.linalg.eigvalsh(formula).min().item())
        computed = torch.autograd.functional.hessian(loss, weight)
        deviation = max(deviation, (computed - formula).abs().max().item())
    return [
        at_least("smallest eigenvalue of XᵀPX(1-P) at 100 random weights", smallest, -1e-10),
        at_most("largest difference from the loss's second derivatives", deviation, 1e-10),
    ]
