"""Running this Python anew, as the tests of imports, settings and builds must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dlops

PACKAGE = Path(dlops.__file__).resolve().parent


def run(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python words...` in `cwd`, with the dlops under test on the path and `env` set."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
