#!/usr/bin/env bash
# Builds dlops with CUDA for scripts/gpu_check.sh, into build/gpu_check/site; does nothing where that
# holds a build of these sources which this Python can use. gpu_check calls it, but a machine that is
# lent for minutes should find the folder made elsewhere, with the same Python (major.minor), torch and
# CUDA (major) as it has:
#
#   PYTHON=path CUDA_HOME=path scripts/gpu_build.sh
#
#   TORCH_CUDA_ARCH_LIST     what to build for (default 9.0a)
#   DLOPS_CPU_CAPABILITY     of the CPU kernels, which GPU tests compare with (default AVX2)
#   MAX_JOBS                 parallel compilations (default: one a core)
#
# What was compiled stays in build/gpu_check/objects: a build that was cut off goes on from there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
work=$root/build/gpu_check
site=$work/site
export DLOPS_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
export DLOPS_CPU_CAPABILITY=${DLOPS_CPU_CAPABILITY:-AVX2}

cd "$root"
sources=$(find csrc dlops build_support setup.py -type f ! -name '*.pyc' ! -name '_build_config.py' \
  ! -name '_C.*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)

report() {
  (cd "$site" && "$python" -m dlops && "$python" -c 'import dlops
assert dlops.build_info()["cuda"], "built without CUDA"')
}

if [ "$(cat "$site/sources" 2> /dev/null)" = "$sources" ] && report; then
  echo "found: $site"
  exit
fi

if [ -z "${CUDA_HOME:-}" ]; then
  nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
  CUDA_HOME=$(dirname "$(dirname "$(realpath "$nvcc")")")
fi
# A toolkit without the libraries' headers takes those that came with torch. nvcc goes by where it is
# itself, so that it is told of them besides.
headers=$("$python" -c 'import sysconfig, torch
major = torch.version.cuda.split(".")[0]
print(sysconfig.get_path("purelib"), "nvidia", f"cu{major}", "include", sep="/")')
if [ ! -e "$CUDA_HOME/include/cublas_v2.h" ] && [ -e "$headers/cublas_v2.h" ]; then
  rm -rf "$work/cuda"
  mkdir -p "$work/cuda/include"
  for part in "$CUDA_HOME"/*; do
    [ "${part##*/}" = include ] || ln -s "$part" "$work/cuda/"
  done
  cp -rs "$headers/." "$work/cuda/include"
  cp -rsf "$CUDA_HOME/include/." "$work/cuda/include"
  CUDA_HOME=$work/cuda
  export NVCC_APPEND_FLAGS="-isystem $headers"
fi
export CUDA_HOME

rm -rf "$site" "$work"/objects/lib.*
"$python" setup.py -q build --build-base "$work/objects"
mkdir -p "$site"
cp -r "$work"/objects/lib.*/dlops "$site"
strip --strip-unneeded "$site"/dlops/_C.*.so
report
echo "$sources" > "$site/sources"
du -sh "$site"
