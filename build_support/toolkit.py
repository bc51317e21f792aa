"""Finding a CUDA toolkit that can build kernels for the installed torch."""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_support.checks import fail

# 9.0a has Hopper's own instructions, whose PTX serves no other GPU: 8.0's serves the rest.
DEFAULT_ARCH_LIST = "8.0+PTX;9.0a"

# What dlops and torch's own CUDA headers include; a runtime-only toolkit lacks some of them.
HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")


# The parts of the pip toolkit that a build needs. crt and nvvm are parts of nvcc; unless they are
# named, pip takes their newest release, whose output an older ptxas refuses.
PIP_PARTS = "nvcc,crt,nvvm,cccl,cudart,cublas,cusolver,cusparse,nvrtc"


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str
    cudart: Path


def arch_list() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST


def choose_toolkit(torch_cuda: str | None) -> tuple[Toolkit | None, str]:
    """The toolkit to build with, or None and the reason why CUDA is left out.

    DLOPS_CUDA=1 asks for CUDA, so that its absence is an error; DLOPS_CUDA=0 leaves it out; unset
    takes it where it can be had. Whether the machine has a GPU plays no part.
    """
    wish = os.environ.get("DLOPS_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"DLOPS_CUDA={wish!r} is not understood. Fix: 1 (required), 0 (left out) or unset.")
    if wish == "0":
        return None, "left out by DLOPS_CUDA=0"
    toolkit, reason = find_toolkit(torch_cuda)
    if toolkit is None and wish == "1":
        fail(f"DLOPS_CUDA=1 asks for CUDA, but {reason}")
    return toolkit, reason


def find_toolkit(torch_cuda: str | None) -> tuple[Toolkit | None, str]:
    if torch_cuda is None:
        return None, "the installed torch is a CPU-only build. Fix: install a CUDA build of torch."
    major = torch_cuda.split(".")[0]
    refusals = []
    for home in candidates(major):
        result = inspect(home, major)
        if isinstance(result, Toolkit):
            return result, ""
        refusals.append(result)
    fix = (
        f"Fix: install a CUDA {major} toolkit and set CUDA_HOME to it, or "
        f'pip install "cuda-toolkit[{PIP_PARTS}]=={torch_cuda}.*"'
    )
    found = "; ".join(refusals) or "there is no CUDA toolkit here (no nvcc found)"
    return None, f"{found}. torch is built with CUDA {torch_cuda}. {fix}"


def candidates(major: str) -> list[Path]:
    """Where a toolkit may be, in order of preference; CUDA_HOME, once set, is the only one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return [Path(os.environ[variable])]
    places = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        # A link to nvcc in a bin folder says nothing about where the toolkit is; its target does.
        places.append(Path(nvcc).resolve().parent.parent)
    places.append(Path("/usr/local/cuda"))
    places.append(Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{major}")
    unique = dict.fromkeys(place.resolve() for place in places)
    return [place for place in unique if (place / "bin" / "nvcc").exists()]


def inspect(home: Path, major: str) -> Toolkit | str:
    """The toolkit in `home`, or why it cannot be used."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{home} has no bin/nvcc"
    missing = [header for header in HEADERS if not (home / "include" / header).exists()]
    if missing:
        return f"{home} has nvcc but no include/{missing[0]}"
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"{nvcc} does not run ({error.strerror})"
    version = re.search(r"release (\d+)\.(\d+)", output)
    if not version:
        return f"{nvcc} --version does not work"
    if version[1] != major:
        return f"the toolkit in {home} is CUDA {version[1]}.{version[2]}, not {major}"
    cudart = find_cudart(home)
    if cudart is None:
        return f"{home} has nvcc but no libcudart"
    obstacle = probe(nvcc)
    if obstacle:
        return f"{nvcc} cannot compile: {obstacle}"
    return Toolkit(home, f"{version[1]}.{version[2]}", cudart)


def probe(nvcc: Path) -> str:
    """Compiles a kernel, as a toolkit with parts missing cannot, nor one that refuses the host's
    compiler. The error, empty where it worked."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <cub/version.cuh>\n__global__ void probe() {}\n")
        host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
        command = [str(nvcc), *host, "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = (result.stderr or result.stdout).splitlines()
    return next((line for line in lines if re.search("error|fatal", line)), "no message")


def find_cudart(home: Path) -> Path | None:
    """libcudart itself: the pip toolkit has no libcudart.so link for -lcudart to find."""
    for folder in ("lib64", "lib", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"):
        for library in sorted((home / folder).glob("libcudart.so*")):
            return library
    return None
