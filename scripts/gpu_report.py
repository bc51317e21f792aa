"""What scripts/gpu_check.sh has found so far: gpu_check-NAME.json and gpu_check-NAME.log.

python scripts/gpu_report.py LOGS OUT/gpu_check-NAME

Written anew after each phase, so that a run which is cut off leaves what it had.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 200_000  # the most of one step


def said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def outcomes(file: Path) -> list[dict[str, str]]:
    """Of a suite's tests, by tests/gpu/gpu_plugin.py; the last line may be cut off."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def by_outcome(found: list[dict[str, str]]) -> dict[str, list[str]]:
    return {
        name: [line["id"] for line in found if line["outcome"] == name]
        for name in ("passed", "failed", "skipped")
    }


def machine(logs: Path) -> dict[str, Any]:
    commit = os.environ.get("DLOPS_COMMIT") or said("git", "-C", f"{ROOT}", "rev-parse", "HEAD")
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": (logs / "device.log").read_text().strip(),
        "nvcc": (said("nvcc", "--version") or "").splitlines()[-2:-1],
        "gpu": said("nvidia-smi", *query),
        "cores": os.cpu_count(),
    }


def main() -> None:
    logs, path = map(Path, sys.argv[1:])
    steps = [line.split("\t") for line in (logs / "steps.tsv").read_text().splitlines()]
    tests = {file.stem: outcomes(file) for file in sorted(logs.glob("*.tests"))}
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(logs),
        "steps": [dict(zip(("name", "status", "seconds"), step, strict=True)) for step in steps],
        "tests": {suite: by_outcome(found) for suite, found in tests.items()},
    }
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    with path.with_suffix(".log").open("w") as log:
        for suite, found in tests.items():
            for line in found:
                if "why" in line:
                    print(f"======== {suite}: {line['id']}\n{line['why']}\n", file=log)
        for name, status, _ in steps:
            printed = logs / f"{name}.log"
            text = printed.read_text(errors="replace") if printed.exists() else ""
            print(f"======== {name}: {status}\n{text[-LOG_BYTES:]}\n", file=log)
    for suite, lists in results["tests"].items():
        print(f"{suite}: " + ", ".join(f"{len(ids)} {name}" for name, ids in lists.items()))
        print(*(f"  FAILED {test}" for test in lists["failed"][:10]), sep="\n", end="")
        print("\n" if lists["failed"] else "", end="")


if __name__ == "__main__":
    main()
