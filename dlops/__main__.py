"""`python -m dlops`: what a bug report needs. Works where dlops itself does not import."""

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dlops._load import PACKAGE, build_config
from dlops._version import __version__

ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
MISSING = "MISSING:"


def report(error: ImportError | None = None) -> str:
    """The report as text; with `error`, the one that `import dlops` raised."""
    lines = [
        ("dlops", f"{__version__} in {PACKAGE}"),
        ("torch", _torch()),
        ("torchvision", _installed("torchvision")),
        ("numpy", _installed("numpy")),
        ("Python", f"{platform.python_version()} in {sys.executable}"),
        ("system", platform.platform()),
        ("CPU", f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores usable"),
    ]
    lines += _broken(error) if error else _working()
    lines += [(name, repr(os.environ[name])) for name in ENVIRONMENT if name in os.environ]
    width = max(len(name) for name, _ in lines) + 2
    indent = "\n" + " " * width
    return "\n".join(f"{name:<{width}}{text.replace(chr(10), indent)}" for name, text in lines)


def _broken(error: ImportError) -> list[tuple[str, str]]:
    config = build_config()
    lines = []
    if config:
        lines.append(("built with", f"torch {config.TORCH_VERSION} (CUDA {config.TORCH_CUDA})"))
        lines.append(("CUDA", "yes" if config.WITH_CUDA else f"no: {config.CUDA_REASON}"))
    return [*lines, ("FAILED", str(error))]


def _working() -> list[tuple[str, str]]:
    import torch

    info = importlib.import_module("dlops._C").build_info()
    cuda = f"yes, toolkit {info['cuda_version']}, for {info['cuda_arch_list']}"
    standard = f"C++{info['cxx_standard'] // 100 % 100}"
    return [
        ("built with", f"torch {info['torch_built_with']}, {info['compiler']}, {standard}"),
        ("vectors", f"{info['cpu_capability']} (built: {info['cpu_capabilities_built']})"),
        ("threads", f"{torch.get_num_threads()}, OpenMP {'yes' if info['openmp'] else 'NO'}"),
        ("CUDA", cuda if info["cuda"] else f"no: {info['cuda_reason']}"),
        ("GPUs", _gpus()),
        ("ops", _ops("CPU")),
        *([("", _ops("CUDA"))] if info["cuda"] else []),
    ]


def _ops(key: str) -> str:
    """How many of the declared ops have a kernel for a dispatch key, and which lack one."""
    import torch

    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dlops::"))
    without = [
        n for n in names if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(n, key)
    ]
    missing = f"\n{MISSING} {', '.join(without)}" if without else ""
    return f"{len(names) - len(without)} of {len(names)} registered on {key}{missing}"


def _torch() -> str:
    try:
        import torch
    except Exception as error:  # a broken torch is worth reporting, whatever breaks in it
        return f"does not import: {error}"
    return f"{torch.__version__} (CUDA {torch.version.cuda}) in {Path(torch.__file__).parent}"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "\n".join(
        f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
        for device in devices
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    text = report()
    print(text)
    sys.exit(MISSING in text)
