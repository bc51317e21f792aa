"""Prints pyproject.toml's requirements for `pip install -r`: build tools, dependencies, and extras.

python scripts/requirements.py examples test            # within their bounds
python scripts/requirements.py --oldest examples test   # each at its lower bound
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    config = tomllib.loads(PROJECT.read_text())
    project = config["project"]
    lists = [config["build-system"]["requires"], project["dependencies"]]
    lists += [project["optional-dependencies"][extra] for extra in extras]
    return list(dict.fromkeys(line for some in lists for line in some))


def oldest(requirement: str) -> str:
    """The patch releases of the lower bound: "numpy>=1.26,<3" gives "numpy==1.26.*"."""
    name, version = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    return f"{name}=={version if '.' in version else version + '.0'}.*"


if __name__ == "__main__":
    lines = requirements([word for word in sys.argv[1:] if word != "--oldest"])
    print("\n".join(map(oldest, lines) if "--oldest" in sys.argv else lines))
