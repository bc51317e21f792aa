"""The version of dlops, in its one place: setup.py and pyproject.toml read this file."""

__version__ = "0.1.0"
