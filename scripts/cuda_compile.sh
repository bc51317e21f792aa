#!/usr/bin/env bash
# Compiles and links the CUDA kernels for sm_80, sm_90a and PTX, warnings as errors, and checks the
# result as far as a machine without a GPU can: every symbol resolves, every architecture is in it.
# The build goes to build/cuda; the installed dlops stays as it is.
#
#   scripts/cuda_compile.sh [python]
#
# Where the environment has no usable CUDA toolkit, the one for its torch is installed from the
# package index.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${1:-python}")")

toolkit() {
  "$python" - "$@" <<'PY'
import sys
import torch
from build_support import toolkit
found, reason = toolkit.find_toolkit(torch.version.cuda)
print(found.home if found else "")
if not found:
    print(reason, file=sys.stderr)
PY
}

cuda=$("$python" -c 'import torch; print(torch.version.cuda)')
install() { "$python" -m pip --disable-pip-version-check install "$1"; }

if [ -z "$(toolkit)" ]; then
  parts=$("$python" -c 'from build_support import toolkit; print(toolkit.PIP_PARTS)')
  install "cuda-toolkit[$parts]==$cuda.*"
fi
CUDA_HOME=$(toolkit)
cuobjdump=$CUDA_HOME/bin/cuobjdump
if [ ! -x "$cuobjdump" ]; then
  install nvidia-cuda-cuobjdump
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cuobjdump=$site/nvidia/cu${cuda%%.*}/bin/cuobjdump
fi
export CUDA_HOME DLOPS_CUDA=1 DLOPS_WERROR=1 TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0a"

rm -rf build/cuda/lib.*
# CUDA changes nothing in the CPU's kernels: those of the usual build serve, where they are fresh.
for cpu in build/temp.*/cpu; do
  [ -d "$cpu" ] || continue
  mkdir -p "build/cuda/${cpu#build/}"
  cp -a "$cpu/." "build/cuda/${cpu#build/}"
done
"$python" setup.py -q build --build-base build/cuda

cd build/cuda/lib.*
"$python" -m dlops
"$python" - <<'PY'
from pathlib import Path

import dlops
from dlops import _C

assert Path(dlops.__file__).is_relative_to(Path.cwd()), f"{dlops.__file__} is not this build"
assert _C.build_info()["cuda"], _C.build_info()
PY
for kind in elf ptx; do
  "$cuobjdump" --list-$kind dlops/_C.*.so | grep -o 'sm_[0-9a]*' | sort | uniq -c | sed "s/$/ ($kind)/"
done > images
cat images
for image in "sm_80 (elf)" "sm_90a (elf)" "sm_80 (ptx)"; do
  grep -qF "$image" images || { echo "no $image in the binary"; exit 1; }
done
