"""Print the worked exercises: each result beside its expected value.

python examples/exercises.py
"""

import sys

from dlops_examples.exercises import EXERCISES
from tabulate import tabulate


def main() -> int:
    """Print all exercises; the exit code is 1 if a result is not the expected one."""
    wrong = 0
    for title, exercise in EXERCISES.items():
        checks = exercise()
        rows = [(c.what, c.result, c.expected, "yes" if c.holds else "NO") for c in checks]
        table = tabulate(rows, ("", "result", "expected", ""), disable_numparse=True)
        print(f"\n{title}\n\n{table}")
        wrong += sum(not check.holds for check in checks)
    print(f"\n{wrong} results are not as expected" if wrong else "\nall results are as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
