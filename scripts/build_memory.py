"""Builds dlops from scratch with two jobs and fails where the compilers ever hold over 4 GiB.

python scripts/build_memory.py    # a few minutes

Where `unshare` may, it takes the network away from the build, which must not need it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS, LIMIT = 2, 4 << 30


def memory_of_session(session: int) -> int:
    """Bytes that the processes of a session hold; pages that several share count in each."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            resident = int((process / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if int(fields[3]) == session:
            total += resident * os.sysconf("SC_PAGE_SIZE")
    return total


def without_network() -> list[str]:
    command = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print("unshare is not allowed here: the build has the network")
        return []
    return command


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        build = ["setup.py", "-q", "build", "-b", folder]
        process = subprocess.Popen(
            [*without_network(), sys.executable, *build],
            cwd=ROOT,
            env={**os.environ, "MAX_JOBS": str(JOBS), "DLOPS_CUDA": "0"},
            start_new_session=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of_session(process.pid))
            time.sleep(0.1)
    print(f"peak of a build with {JOBS} jobs: {peak / 2**30:.2f} GiB")
    return process.returncode or int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
