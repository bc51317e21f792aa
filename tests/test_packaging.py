"""The installed package: the import guard, the report, what the binary can do and what it holds."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process import PACKAGE, run

import dlops
from dlops import _C, _load

pytestmark = pytest.mark.packaging

REBUILD = "python -m pip install --no-build-isolation"


# ---- import guard


def built_with(version: str, cuda: str | None, with_cuda: bool) -> SimpleNamespace:
    return SimpleNamespace(
        TORCH_VERSION=version, TORCH_CUDA=cuda, WITH_CUDA=with_cuda, CUDA_REASON=""
    )


@pytest.mark.parametrize(
    ("version", "cuda", "with_cuda"),
    [
        pytest.param("2.10.1+cu130", "13.0", False, id="older torch"),
        pytest.param("3.0.0", None, False, id="newer torch"),
        pytest.param(torch.__version__, "11.8", True, id="another CUDA"),
    ],
)
def test_binary_of_another_torch_is_refused(monkeypatch, version, cuda, with_cuda):
    monkeypatch.setattr(_load, "build_config", lambda: built_with(version, cuda, with_cuda))
    with pytest.raises(ImportError) as refusal:
        _load.extension()
    message = str(refusal.value)
    assert f"built with torch {version} (CUDA {cuda})" in message
    assert f"this is torch {torch.__version__} (CUDA {torch.version.cuda})" in message
    assert REBUILD in message


@pytest.mark.parametrize(
    ("version", "cuda"),
    [
        pytest.param(re.sub(r"\.\d+(\+.*)?$", ".99", torch.__version__), None, id="patch release"),
        pytest.param(torch.__version__, "11.8", id="CPU kernels under another CUDA"),
    ],
)
def test_binary_of_a_compatible_torch_is_accepted(monkeypatch, version, cuda):
    monkeypatch.setattr(_load, "build_config", lambda: built_with(version, cuda, False))
    assert _load.extension() is _C


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The installed package, where a test may damage it."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "dlops"))


def damage_torch_version(package: Path) -> str:
    config = package / "_build_config.py"
    config.write_text(re.sub(r"TORCH_VERSION = .*", "TORCH_VERSION = '2.1.0'", config.read_text()))
    return "built with torch 2.1.0"


def damage_binary(package: Path) -> str:
    next(package.glob("_C.*.so")).write_bytes(b"not a library")
    return "does not load"


def remove_binary(package: Path) -> str:
    next(package.glob("_C.*.so")).unlink()
    return "dlops is not built"


def binary_of_another_python(package: Path) -> str:
    binary = next(package.glob("_C.*.so"))
    binary.rename(binary.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    return "built for another Python (_C.cpython-39-x86_64-linux-gnu.so)"


def forge_torch_version(package: Path) -> str:
    """A record that agrees with this torch, beside a binary that needs symbols of another one."""
    binary = next(package.glob("_C.*.so"))
    content, count = re.subn(
        rb"_ZNK2at10TensorBase(?=\d)", b"_ZNK2at10TensorBone", binary.read_bytes()
    )
    assert count
    binary.write_bytes(content)
    return "does not load"


DAMAGES = [
    damage_torch_version,
    forge_torch_version,
    damage_binary,
    remove_binary,
    binary_of_another_python,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_import_of_a_damaged_installation_says_how_to_rebuild(copied_package, damage):
    expected = damage(copied_package)
    result = run("-c", "import dlops", cwd=copied_package.parent)
    _, _, message = result.stderr.rpartition("ImportError: ")
    assert expected in message
    assert REBUILD in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_report_works_on_a_damaged_installation(copied_package, damage):
    expected = damage(copied_package)
    result = run("-m", "dlops", cwd=copied_package.parent)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"torch {torch.__version__}" in re.sub(" +", " ", result.stdout)
    assert expected in result.stdout.partition("FAILED")[2]


def test_import_without_torch_says_to_install_it(copied_package):
    # -S leaves out site-packages, and torch with them.
    result = run("-S", "-c", "import dlops", cwd=copied_package.parent, PYTHONPATH="")
    _, _, message = result.stderr.rpartition("ImportError: ")
    assert "needs torch" in message
    assert "pip install torch" in message


# ---- the wheel


def wheel(folder: Path, **files: bytes) -> Path:
    """A wheel of this Python and system, of the real files' names."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{python}-{python}-{re.sub('[-.]', '_', sysconfig.get_platform())}"
    info = "dlops-1.dist-info"
    metadata = "Requires-Python: >=3.11\nRequires-Dist: torch<3,>=2\nRequires-Dist: numpy<3,>=1\n"
    contents = {
        "dlops/__init__.py": b"",
        "dlops/_build_config.py": b"",
        "dlops/_C.abc.so": b"",
        "dlops/py.typed": b"",
        f"{info}/LICENSE": b"",
        f"{info}/METADATA": (metadata + "License: BSD-3-Clause\n").encode(),
        f"{info}/WHEEL": f"Root-Is-Purelib: false\nTag: {tag}\n".encode(),
        **{name.replace("__", "/"): content for name, content in files.items()},
    }
    path = folder / f"dlops-1-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


CHECK_WHEEL = Path(__file__).resolve().parents[1] / "scripts" / "check_wheel.py"


@pytest.mark.skipif(not CHECK_WHEEL.exists(), reason="the scripts are not beside these tests")
@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, None),
        ({"tests__test_conv2d.py": b""}, "does not belong"),
        ({"dlops__x.py": b"/home/someone/dlops/csrc"}, "names /home/someone/dlops/csrc"),
        ({"dlops__ops___C.so": b""}, "does not belong"),
        ({"dlops-1.dist-info__WHEEL": b"Root-Is-Purelib: true\n"}, "WHEEL does not say"),
        ({"dlops-1.dist-info__METADATA": b"Requires-Dist: torch\n"}, "METADATA has no line"),
    ],
)
def test_wheels_are_checked(tmp_path, files, complaint):
    """scripts/wheel_test.sh checks the real one."""
    result = run(CHECK_WHEEL, wheel(tmp_path, **files), cwd=tmp_path)
    if complaint is None:
        assert result.returncode == 0, result.stdout
    else:
        assert complaint in result.stdout
        assert result.returncode == 1


# ---- the report and build_info


def test_report_names_what_a_bug_report_needs(tmp_path):
    result = run("-m", "dlops", cwd=tmp_path)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line[0] != " ")
    info = _C.build_info()
    assert lines["dlops"].startswith(dlops.__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert info["compiler"] in result.stdout
    assert lines["CUDA"].startswith("yes" if info["cuda"] else f"no: {info['cuda_reason']}")
    assert {"torchvision", "numpy", "system", "CPU", "vectors", "threads", "GPUs", "ops"} <= {
        *lines
    }


def test_every_op_is_registered(tmp_path):
    result = run("-m", "dlops", cwd=tmp_path)
    assert re.search(r"^ops +(\d+) of \1 registered on CPU$", result.stdout, re.MULTILINE)
    assert "MISSING" not in result.stdout
    assert result.returncode == 0, result.stdout


def test_build_info():
    info = _C.build_info()
    assert info["version"] == dlops.__version__
    assert info["torch_built_with"] == torch.__version__
    assert info["cxx_standard"] >= 202002
    assert info["openmp"] is True
    assert info["cpu_capability"] in info["cpu_capabilities_built"].split()
    assert info["cuda"] == (info["cuda_reason"] == "") == (info["cuda_version"] != "")
    assert info["cuda"] == (info["cuda_arch_list"] != "")


def test_binary_holds_no_paths_of_the_build_machine():
    paths = re.findall(rb"/[\w./+-]+\.(?:cpp|cuh?|h)\b", Path(_C.__file__).read_bytes())
    absolute = {path for path in paths if Path(os.fsdecode(path)).exists()}
    assert not absolute
    binary = Path(_C.__file__).read_bytes()
    assert os.fsencode(Path(torch.__file__).parent) not in binary
    # A run path, handed down by a Python that was linked with one.
    assert os.fsencode(sysconfig.get_config_var("LIBDIR")) + b"\0" not in binary


# ---- threads and vector code

CALLS = """
import os, torch
from torch.nn import functional as native
import torchvision.ops
import dlops.functional as F

torch.manual_seed(0)
image = torch.randn(8, 16, 32, 32)
weight = torch.randn(32, 16, 3, 3)
logits = torch.randn(4096, 91)
labels = torch.randint(91, (4096,))
hits = (torch.rand(4096, 91) < 0.02).float()
CALLS = {
    "conv2d": lambda: F.conv2d(image, weight, padding=1),
    "max_pool2d": lambda: F.max_pool2d(image, 3, 2),
    "unfold": lambda: F.unfold(image, 3),
    "sigmoid_focal_loss": lambda: F.sigmoid_focal_loss(logits, hits),
    "focal_loss": lambda: F.focal_loss(logits, labels, gamma=0.0, reduction="none"),
}
NATIVE = {
    "conv2d": lambda: native.conv2d(image, weight, padding=1),
    "max_pool2d": lambda: native.max_pool2d(image, 3, 2),
    "unfold": lambda: native.unfold(image, 3),
    "sigmoid_focal_loss": lambda: torchvision.ops.sigmoid_focal_loss(logits, hits),
    "focal_loss": lambda: native.cross_entropy(logits, labels, reduction="none"),
}
"""
THREADS = """
call = CALLS[name]
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
torch.set_num_threads(2)
call()
print(count() - before)
"""
VALUES = """
for name in CALLS:
    torch.testing.assert_close(CALLS[name](), NATIVE[name](), rtol=1e-4, atol=1e-4)
print(dlops._C.build_info()["cpu_capability"])
"""
OPS = ["conv2d", "max_pool2d", "unfold", "sigmoid_focal_loss", "focal_loss"]


@pytest.mark.parametrize("name", OPS)
def test_two_threads_are_used(tmp_path, name):
    """at::parallel_for, compiled without OpenMP, would never start a second thread."""
    result = run("-c", f"{CALLS}\nname = {name!r}\n{THREADS}", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert result.stdout.split() == ["1"], result.stdout + result.stderr


def test_torch_and_dlops_share_one_openmp(tmp_path):
    """Two would each start their own threads, and set_num_threads would reach one of them."""
    script = "import dlops; print(*{l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l})"
    result = run("-c", script, cwd=tmp_path)
    runtimes = [path for path in result.stdout.split() if re.search(r"lib[gi]?omp", path)]
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(
    "AVX2" not in _C.build_info()["cpu_capabilities_built"], reason="this CPU has one capability"
)
@pytest.mark.parametrize(
    ("setting", "name"), [("default", "baseline"), ("avx2", "AVX2"), ("avx512", "AVX512")]
)
def test_every_capability_gives_the_native_values(tmp_path, setting, name):
    if name.lower() == "avx512" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    result = run(
        "-c", f"import dlops\n{CALLS}\n{VALUES}", cwd=tmp_path, ATEN_CPU_CAPABILITY=setting
    )
    assert result.stdout.split() == [name], result.stdout + result.stderr


# Code of one capability: its template argument, torch's namespace for it, or a function that no
# other object file can see.
OF_ONE_CAPABILITY = re.compile(r"<[12][,>]|AVX2|AVX512|\(anonymous namespace\)")


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_wide_registers_are_used_only_where_the_cpu_was_asked():
    """Where objects share an inline function, the baseline's must be the one that is linked."""
    command = ["objdump", "-dC", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide = set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2]
        elif "%ymm" in line or "%zmm" in line:
            wide.add(function)
    assert wide or platform.machine() != "x86_64"
    assert {name for name in wide if not OF_ONE_CAPABILITY.search(name)} == set()
