"""Exercises with exact answers, worked on dlops' ops: every function returns its checks."""

from collections.abc import Callable

from . import convolution, regression, relu
from .check import Check

EXERCISES: dict[str, Callable[[], list[Check]]] = {
    "1. Convolution as a matrix": convolution.as_matrix,
    "2. The local linear map of a ReLU network": relu.local_linear_map,
    "3. Accounting for a convolution layer": convolution.accounting,
    "4. Average and maximum pooling": convolution.pooling,
    "5. When a 1x1 convolution is a scaling": convolution.pointwise,
    "6. What ReLU networks compute, and when they cannot learn": relu.logic_and_learning,
    "7. The Hessian of logistic regression": regression.hessian,
}

__all__ = ["EXERCISES", "Check"]
