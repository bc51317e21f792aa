"""What dlops depends on, and that neither import, ops nor the default training use the network."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from process import PACKAGE, run

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]

# Any look-up of a name and any connection ends the process, whoever catches the exception.
NO_NETWORK = """
import os, sys

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "urllib.")):
        print("network:", event, arguments, file=sys.stderr, flush=True)
        os._exit(99)

sys.addaudithook(refuse)
"""
OPS = """
import torch, dlops, dlops.functional as F
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.MaxPool2d(2), torch.nn.Flatten())
logits = dlops.convert(model)(torch.randn(2, 1, 6, 6))
F.focal_loss(logits, torch.tensor([0, 1])).backward()
F.sigmoid_focal_loss(logits.detach(), torch.ones_like(logits))
"""


def offline(*words: str) -> list[str]:
    """The command in a network of its own, which leads nowhere, where the system allows that."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and not subprocess.run([*command, "true"]).returncode:
        return [*command, *words]
    return list(words)


def run_offline(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        offline(sys.executable, "-c", NO_NETWORK + script),
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent), "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_and_ops_need_no_network(tmp_path: Path) -> None:
    result = run_offline(OPS, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_connection_would_be_seen(tmp_path: Path) -> None:
    script = NO_NETWORK + "import socket\nsocket.create_connection(('127.0.0.1', 9))"
    result = run("-c", script, cwd=tmp_path)
    assert result.returncode == 99
    assert "network: socket." in result.stderr


@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not here")
def test_default_training_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["train.py", "--limit", "64", "--epochs", "1", "--threads", "1"]
    script = (
        f"sys.path.insert(0, {str(ROOT / 'examples')!r}); sys.argv = {arguments!r}\n"
        "from dlops_examples.cli import main\n"
        f"sys.exit(main({[*arguments[1:], '--out', str(tmp_path / 'run')]!r}))\n"
    )
    result = run_offline(script, tmp_path)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------
# Dependencies

needs_sources = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists() or not (ROOT / "docs").is_dir(),
    reason="needs pyproject.toml and docs",
)


def requirements() -> dict[str, str]:
    """What pyproject.toml asks for, anywhere: name and bounds."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [config["build-system"]["requires"], config["project"]["dependencies"]]
    lists += config["project"]["optional-dependencies"].values()
    found = {}
    for requirement in (line for some in lists for line in some):
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        assert found.setdefault(name, bounds) == bounds, f"{name} has two sets of bounds"
    return found


@needs_sources
@pytest.mark.parametrize("name", requirements() if (ROOT / "pyproject.toml").exists() else [])
def test_dependencies_are_bounded_and_explained(name: str) -> None:
    assert re.fullmatch(r">=[\d.]+,<[\d.]+|==[\d.]+\.\*", requirements()[name])
    page = (ROOT / "docs" / "reliability.md").read_text()
    row = re.search(rf"^\| {re.escape(name)} \|(.+)\|(.+)\|(.+)\|$", page, re.MULTILINE)
    assert row, f"docs/reliability.md does not say why {name} is there"
    assert row[1].strip() == f"`{requirements()[name]}`"


def test_the_installed_package_asks_for_what_it_was_built_with() -> None:
    try:
        asked = importlib.metadata.requires("dlops") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dlops runs from its sources and is not installed")
    plain = {re.match(r"[\w-]+", line)[0] for line in asked if "extra ==" not in line}
    assert plain == {"torch", "numpy"}
