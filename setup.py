"""Builds dlops. Metadata is in pyproject.toml; the work is in build_support/.

Environment: DLOPS_CUDA (1 required, 0 left out), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX,
DLOPS_WERROR (1: warnings are errors).
"""

import sys
from pathlib import Path

# pip does not put the source tree on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.checks import check_platform, check_torch

check_platform()
check_torch()

from setuptools import setup  # noqa: E402

from build_support.build_ext import BuildExt, extension  # noqa: E402

setup(
    license="BSD-3-Clause",
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
)
