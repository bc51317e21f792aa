"""Prints pyproject.toml's requirements for `pip install -r`: build tools, dependencies, and extras.

python scripts/requirements.py examples test
"""

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


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
