"""Loads dlops._C, the compiled part, or says in one message why it cannot be used and what to do.

A binary built with another torch would fail with an undefined symbol, or crash later; so what the
build wrote down (dlops/_build_config.py) is compared with the running torch first.
"""

import importlib
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent


def extension() -> ModuleType:
    """The module dlops._C.

    Raises ImportError where it cannot be used. Under `python -m dlops`, whose purpose is to show
    what is wrong, prints the report instead and exits with status 1.
    """
    try:
        return _load()
    except ImportError as error:
        if not _report_asked():
            raise
        from dlops.__main__ import report

        print(report(error))
        raise SystemExit(1) from None


def rebuild_command() -> str:
    if (PACKAGE.parent / "setup.py").exists():
        return (
            "python -m pip install --no-build-isolation --no-deps --force-reinstall "
            f"-e {PACKAGE.parent}"
        )
    return (
        "in a clone of dlops, python -m pip install --no-build-isolation --no-deps "
        "--force-reinstall ."
    )


def build_config() -> ModuleType | None:
    """What the build wrote down, readable without the binary; None where nothing was built."""
    try:
        return importlib.import_module("dlops._build_config")
    except ModuleNotFoundError:
        return None


def _load() -> ModuleType:
    _check_torch_is_there()
    config = build_config()
    if config is None or not any(
        (PACKAGE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES
    ):
        raise ImportError(_not_built())
    _check_torch_is_the_same(config)
    try:
        return importlib.import_module("dlops._C")
    except ImportError as error:
        raise ImportError(
            f"dlops' compiled module does not load: {error}\nRebuild: {rebuild_command()}"
        ) from None


def _check_torch_is_there() -> None:
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            "dlops needs torch, and this Python has none.\n"
            f"Install it (python -m pip install torch), then rebuild dlops: {rebuild_command()}"
        ) from None


def _not_built() -> str:
    others = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
    if others:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"dlops was built for another Python ({', '.join(others)}); this is Python {version}.\n"
            f"Rebuild: {rebuild_command()}"
        )
    message = (
        f"dlops is not built: {PACKAGE} has no compiled module.\nBuild it: {rebuild_command()}"
    )
    if (PACKAGE.parent / "setup.py").exists():
        message += (
            "\n(This is the source tree. If dlops is installed elsewhere, Python found the sources "
            "first: run from another folder.)"
        )
    return message


def _check_torch_is_the_same(config: ModuleType) -> None:
    import torch

    built = f"torch {config.TORCH_VERSION} (CUDA {config.TORCH_CUDA})"
    running = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    same = _release(config.TORCH_VERSION) == _release(torch.__version__)
    if config.WITH_CUDA:
        same = same and _cuda_major(config.TORCH_CUDA) == _cuda_major(torch.version.cuda)
    if not same:
        raise ImportError(
            f"dlops was built with {built}, and this is {running}: a binary works only with the "
            f"torch it was built with.\nRebuild: {rebuild_command()}"
        )


def _release(version: str) -> tuple[str, ...]:
    """Major and minor: torch's binary interface is stable within them, and only there."""
    return tuple(re.split(r"[.+]", str(version))[:2])


def _cuda_major(version: str | None) -> str | None:
    return version.split(".")[0] if version else None


def _report_asked() -> bool:
    # While `python -m` looks for its module, and so imports the package, sys.argv[0] is "-m".
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "dlops" in words[words.index("-m") + 1 :][:1]
