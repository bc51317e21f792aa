"""setup.py: its refusals, one message and fix each; its choice of a CUDA toolkit; the sdist."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import pytest
from process import run

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(),
        reason="needs the source tree; this is a test of the wheel",
    ),
]


# ---- setup.py


def setup(tmp_path: Path, *flags: str, **env: str) -> str:
    """What a failing build says; it must be a message, not a traceback."""
    result = run(
        *flags, ROOT / "setup.py", "-q", "build", "-b", tmp_path / "build", cwd=ROOT, **env
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def fake_torch(folder: Path, source: str) -> str:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(source)
    return str(folder)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_build_without_torch(tmp_path):
    message = setup(tmp_path, "-S", PYTHONPATH="")
    assert "needs torch" in message
    assert "pip install 'torch>=2.11,<2.16'" in message
    assert "--no-build-isolation" in message


@pytest.mark.parametrize("version", ["2.10.0+cu130", "2.16.0", "1.13.1", "3.0.0"])
def test_build_with_an_unsupported_torch(tmp_path, version):
    path = fake_torch(tmp_path, f"__version__ = {version!r}")
    message = setup(tmp_path, PYTHONPATH=path)
    assert f"torch {version} is installed; dlops supports 2.11 to 2.15" in message
    assert "pip install 'torch>=2.11,<2.16'" in message


def test_build_with_a_broken_torch(tmp_path):
    path = fake_torch(tmp_path, "raise ImportError('libcudart.so.13: cannot open')")
    assert "importing it fails: libcudart.so.13: cannot open" in setup(tmp_path, PYTHONPATH=path)


def test_build_without_a_compiler(tmp_path):
    message = setup(tmp_path, CXX="/nowhere/g++")
    assert "no C++ compiler ('/nowhere/g++' not found)" in message
    assert "apt install g++" in message


def test_build_with_a_compiler_that_is_too_old(tmp_path):
    error = "error: unrecognized command-line option -std=c++20"
    old = script(tmp_path / "old-g++", f"echo 'g++: {error}' >&2; exit 1")
    message = setup(tmp_path, CXX=str(old))
    assert error in message
    assert "g++ 11 or newer" in message


def test_python_and_torch_ranges_are_the_same_for_pip_and_setup(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from build_support import checks

    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={checks.dotted(checks.PYTHON_MIN)}"' in project
    (major, minor) = checks.TORCH_MAX
    assert f'"torch>={checks.dotted(checks.TORCH_MIN)},<{major}.{minor + 1}"' in project


# ---- the CUDA toolkit


@pytest.fixture
def toolkits(monkeypatch):
    """build_support.toolkit, on a machine without any toolkit of its own."""
    monkeypatch.syspath_prepend(ROOT)
    from build_support import toolkit

    for variable in ("CUDA_HOME", "CUDA_PATH", "DLOPS_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    return toolkit


def fake_toolkit(home: Path, release: str, headers: tuple[str, ...], compiles: bool = True) -> Path:
    version = (
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V0" && exit'
    )
    compiling = "exit 0" if compiles else "echo 'error: unsupported GNU version!' >&2; exit 1"
    script(home / "bin" / "nvcc", f"{version}\n{compiling}")
    for header in headers:
        (home / "include").mkdir(exist_ok=True)
        (home / "include" / header).touch()
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    return home


def test_toolkit_is_found_behind_a_link_to_nvcc(toolkits, tmp_path, monkeypatch):
    home = fake_toolkit(tmp_path / "cuda", "13.2", toolkits.HEADERS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found, reason = toolkits.choose_toolkit("13.0")
    assert (found.home, found.version, reason) == (home, "13.2", "")
    assert found.cudart.name == "libcudart.so.13"


@pytest.mark.parametrize(
    ("release", "headers", "compiles", "expected"),
    [
        pytest.param("12.8", None, True, "is CUDA 12.8, not 13", id="another major version"),
        pytest.param("13.2", (), True, "no include/cuda_runtime.h", id="no headers"),
        pytest.param(
            "13.2", ("cuda_runtime.h",), True, "no include/cublas_v2.h", id="runtime only"
        ),
        pytest.param("13.2", None, False, "unsupported GNU version", id="host compiler"),
    ],
)
def test_unusable_toolkit(toolkits, tmp_path, monkeypatch, release, headers, compiles, expected):
    headers = toolkits.HEADERS if headers is None else headers
    monkeypatch.setenv(
        "CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", release, headers, compiles))
    )
    found, reason = toolkits.choose_toolkit("13.2")
    assert found is None
    assert expected in reason
    assert "install a CUDA 13 toolkit and set CUDA_HOME" in reason
    monkeypatch.setenv("DLOPS_CUDA", "1")
    with pytest.raises(SystemExit, match=f"DLOPS_CUDA=1 asks for CUDA, but .*{expected}"):
        toolkits.choose_toolkit("13.2")


def test_cuda_under_a_torch_without_it(toolkits, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "c", "13.2", toolkits.HEADERS)))
    assert toolkits.choose_toolkit(None)[0] is None
    monkeypatch.setenv("DLOPS_CUDA", "1")
    with pytest.raises(SystemExit, match="CPU-only build"):
        toolkits.choose_toolkit(None)


def test_cuda_left_out_on_request(toolkits, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "c", "13.2", toolkits.HEADERS)))
    monkeypatch.setenv("DLOPS_CUDA", "0")
    assert toolkits.choose_toolkit("13.2") == (None, "left out by DLOPS_CUDA=0")
    monkeypatch.setenv("DLOPS_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes' is not understood"):
        toolkits.choose_toolkit("13.2")


def test_missing_cuda_stops_a_build_that_asks_for_it(toolkits, tmp_path):
    message = setup(tmp_path, DLOPS_CUDA="1", CUDA_HOME=str(tmp_path / "nothing"))
    assert "DLOPS_CUDA=1 asks for CUDA, but" in message


# ---- the sdist


def test_vector_kernels_for_one_capability(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from build_support import build_ext

    every = [capability.name for capability in build_ext.CAPABILITIES]
    monkeypatch.delenv("DLOPS_CPU_CAPABILITY", raising=False)
    assert [capability.name for capability in build_ext.capabilities().values()] == every
    monkeypatch.setenv("DLOPS_CPU_CAPABILITY", every[-1])
    assert list(build_ext.capabilities()) == [len(every) - 1]
    monkeypatch.setenv("DLOPS_CPU_CAPABILITY", "sse2")
    with pytest.raises(
        SystemExit, match=r"DLOPS_CPU_CAPABILITY='sse2' is not understood.*baseline"
    ):
        build_ext.capabilities()


def test_sdist_has_every_source_and_nothing_built(tmp_path):
    commands = ["-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    result = run("setup.py", *commands, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("dlops-*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    trees = ("csrc", "build_support", "dlops", "tests")
    sources = {
        str(path.relative_to(ROOT))
        for tree in trees
        for path in (ROOT / tree).rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".py"} and path.name != "_build_config.py"
    }
    assert sources <= files
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md"} <= files
    built = {name for name in files if re.search(r"\.(so|o|pyc)$|_build_config\.py$", name)}
    assert not built
