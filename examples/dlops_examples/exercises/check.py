"""One line of an exercise: a result beside its expected value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    what: str
    result: str
    expected: str
    holds: bool


def equal(what: str, result: object, expected: object) -> Check:
    return Check(what, str(result), str(expected), result == expected)


def at_most(what: str, result: float, bound: float) -> Check:
    return Check(what, f"{result:.2g}", f"<= {bound:g}", result <= bound)


def at_least(what: str, result: float, bound: float) -> Check:
    return Check(what, f"{result:.2g}", f">= {bound:g}", result >= bound)
