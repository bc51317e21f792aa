"""The table that a run prints, row by row, and its last lines."""

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]
PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}
COLUMNS = {
    "case": 48,
    "layout": 13,
    "pass": 7,
    "native ms": 16,
    "dlops ms": 16,
    "native/dlops": 12,
    "compile ms": 16,
    "compile/dlops": 13,
    "limit ms": 9,
    "% of limit": 10,
}
LEFT = ("case", "layout", "pass")


def header(op: str, dtype: str) -> str:
    """The head of an op's table; times are medians with half of the interquartile range."""
    rule = ["-" * (width - 1) + ("-" if c in LEFT else ":") for c, width in COLUMNS.items()]
    return f"\n### {op}, {dtype}\n\n{_line(dict(zip(COLUMNS, COLUMNS, strict=True)))}\n" + (
        "| " + " | ".join(rule) + " |"
    )


def line(row: Row) -> str:
    times = row["times"]
    cells = {
        "case": row["case"],
        "layout": row["layout"],
        "pass": PASSES[row["pass"]],
        "native/dlops": f"{row['speedup']:.2f}",
        "limit ms": f"{row['limit_s'] * 1e3:.3f}",
        "% of limit": f"{row['percent_of_limit']:.0f}",
    }
    for name, time in times.items():
        spread = 50 * time["iqr_s"] / time["median_s"]
        cells[f"{name} ms"] = f"{time['median_s'] * 1e3:.3f} ±{spread:.0f}%"
    if "compile" in times:
        ratio = times["compile"]["median_s"] / times["dlops"]["median_s"]
        cells["compile/dlops"] = f"{ratio:.2f}"
    return _line(cells)


def show(rows: Sequence[Row]) -> str:
    """The tables of a whole run."""
    lines = []
    for (op, dtype), group in _grouped(rows, "op", "dtype").items():
        lines += [header(op, dtype), *map(line, group)]
    return "\n".join([*lines, means(rows)])


def means(rows: Sequence[Row]) -> str:
    """Native's time over dlops': geometric mean, smallest and largest for each op and layout."""
    lines = [
        "\n### native / dlops: geometric mean (smallest to largest)\n",
        f"| op, dtype, layout | cases | {' | '.join(PASSES.values())} |",
        "|---|---:|---:|---:|",
    ]
    for labels, group in _grouped([*rows, *_best_layouts(rows)], "op", "dtype", "layout").items():
        by_pass = _grouped(group, "pass")
        cells = [_mean([row["speedup"] for row in by_pass[(name,)]]) for name in PASSES]
        label = ", ".join(filter(None, labels))
        lines.append(f"| {label} | {len(group) // len(PASSES)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(speedups: Sequence[float]) -> str:
    return f"{geometric_mean(speedups):.2f} ({min(speedups):.2f} to {max(speedups):.2f})"


def _best_layouts(rows: Sequence[Row]) -> list[Row]:
    """Each case's faster layout of native against the faster one of dlops."""
    found = []
    for group in _grouped(rows, "op", "case", "dtype", "pass").values():
        if len(group) > 1:
            native, ours = (
                min(row["times"][name]["median_s"] for row in group) for name in ("native", "dlops")
            )
            found.append(group[0] | {"layout": "best layout of each", "speedup": native / ours})
    return found


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _line(cells: dict[str, str]) -> str:
    padded = (
        cells.get(c, "").ljust(width) if c in LEFT else cells.get(c, "").rjust(width)
        for c, width in COLUMNS.items()
    )
    return "| " + " | ".join(padded) + " |"
