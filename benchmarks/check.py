"""``make bench-check``: a short run against committed results, naming what has become slower."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .harness import Case
from .report import PASSES, Row

# A case is slower where both native's time over dlops' and the percent of the machine's limit are
# below this part of what they were: the first allows for another machine, the second for native's
# own changes, and the margin for noise.
MARGIN = 0.75
MEASURES = ("speedup", "percent_of_limit")


def measures(before: Row) -> tuple[str, ...]:
    """Of older results, the limit of memory was a copy timed alone, which none is compared with."""
    return MEASURES if "copy" in before else MEASURES[:1]


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "case", "layout", "dtype", "pass"))


class Baseline:
    """Committed results, by case."""

    def __init__(self, path: Path) -> None:
        results = json.loads(path.read_text())
        self.rows = {key(row): row for row in results["rows"]}
        self.commit = results["context"]["commit"]
        self.threads = results["context"]["threads"]

    def holds(self, case: Case, dtype: str) -> bool:
        return (case.op, case.name, case.layout, dtype, "forward") in self.rows

    def slower(self, rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
        """A line for each row that is slower than it was."""
        found = {}
        for row in rows:
            before = self.rows.get(key(row))
            if before and all(row[name] < MARGIN * before[name] for name in measures(before)):
                found[key(row)] = self._line(row, before)
        return found

    def _line(self, row: Row, before: Row) -> str:
        words = (row["op"], row["case"], row["layout"], row["dtype"], PASSES[row["pass"]])
        return (
            f"{' '.join(filter(None, words))}: native/dlops {before['speedup']:.2f} at "
            f"{self.commit[:8]}, now {row['speedup']:.2f}; {before['percent_of_limit']:.0f} % of "
            f"the limit, now {row['percent_of_limit']:.0f} %"
        )

    def regressions(self, once: Callable[[], Sequence[Row]]) -> list[str]:
        """A line for each pass of a case that is slower twice in a row."""
        first = self.slower(once())
        again = self.slower(once()) if first else {}
        return [line for row, line in again.items() if row in first]
