"""What a result belongs to: commit, versions, machine and settings."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from dlops_examples.allocator import SETTINGS

import dlops

ROOT = Path(__file__).resolve().parents[1]

OURS = ("DLOPS_CPU_", "DLOPS_CUDA_CONV2D")  # what chooses kernels


def context(device: torch.device) -> dict[str, Any]:
    # The results of one benchmark do not change what the next one measures.
    apart = (".", ":(exclude)benchmarks/results")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *apart)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("DLOPS_COMMIT") or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "dlops": dlops.__version__,
        "dlops_build": dlops.build_info(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "allocator": {name: os.environ.get(name) for name in SETTINGS},
        "settings": {name: v for name, v in os.environ.items() if name.startswith(OURS)},
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


def describe(context: dict[str, Any]) -> str:
    """The context in a few lines, for people."""
    commit = f"{(context['commit'] or 'unknown')[:12]}{' with changes' if context['dirty'] else ''}"
    allocator = all(context["allocator"].values())
    lines = [
        f"commit {commit}, {context['date']}",
        f"torch {context['torch']}, torchvision {context['torchvision']}, "
        f"Python {context['python']}",
        f"{context['cpu']}, {context['cpu_capability']}, {context['threads']} threads",
        f"freed memory {'kept mapped' if allocator else 'NOT kept mapped'} (glibc settings)",
    ]
    if "gpu" in context:
        tf32 = "on" if context["tf32"] else "off"
        lines.append(
            f"{context['gpu']}, CUDA {context['cuda']}, cuDNN {context['cudnn']}, TF32 {tf32}"
        )
    if context.get("settings"):
        lines.append(", ".join(f"{name}={value}" for name, value in context["settings"].items()))
    if context["load_average"] > 1:
        lines.append(
            f"load average {context['load_average']:.1f}: other processes disturb the times"
        )
    return "\n".join(lines)


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
