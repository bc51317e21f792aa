#!/usr/bin/env bash
# Builds dlops' C++ with sanitizers, apart from the usual build, and runs tests of every op on it.
#
#   scripts/sanitize.sh [python [address | thread ...]]
#
# address   AddressSanitizer and UndefinedBehaviorSanitizer, on every CPU capability that the
#           machine has, and with AMX as tests/tiles plays it
# thread    ThreadSanitizer, with at::parallel_for made of threads that it can follow, on the
#           widest capability alone: threads are shared out alike on all
#
# torch itself is not instrumented. Each part begins with a fault on purpose, which must be found.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${1:-python}")
shift || true
parts=("$@")
((${#parts[@]})) || parts=(address thread)

library() { ${CXX:-c++} -print-file-name="$1"; }

build() { # name, flags, CPU capability or nothing
  echo "==== $1: building"
  DLOPS_CPU_CAPABILITY=${3:-} DLOPS_CUDA=0 DLOPS_WERROR=0 DLOPS_CXX_FLAGS="-O1 -g1 -fno-omit-frame-pointer $2" \
    "$python" setup.py --quiet build --build-base "build/sanitize/$1" > "build/sanitize/$1.log" 2>&1 ||
    { tail -n 30 "build/sanitize/$1.log"; exit 1; }
}

# Runs a command on the build of that name.
sanitized() {
  local name=$1 preload=("$(library libstdc++.so)")
  shift
  case $name in
    address) preload=("$(library libasan.so)" "$(library libubsan.so)" "${preload[@]}") ;;
    thread) preload=("$(library libtsan.so)" "${preload[@]}") ;;
  esac
  # Addresses are not laid out at random: ThreadSanitizer's own must stay free. Without the safe path
  # `python -m pytest` would import dlops from this folder, whose build is the usual one.
  PYTHONSAFEPATH=1 PYTHONPATH=$(echo "$root/build/sanitize/$name"/lib*):$root/tests \
    LD_PRELOAD="${preload[*]}" \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:print_warnings=0 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:exitcode=66 \
    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 DLOPS_FUZZ_EXAMPLES=40 \
    setarch -R "$@"
}

must_be_found() { # name, what the report says, command
  local name=$1 report=$2 output
  shift 2
  if output=$(sanitized "$name" "$@" 2>&1) || ! grep -q "$report" <<< "$output"; then
    printf '%s\nsanitize: a fault on purpose was not reported (%s)\n' "$output" "$report"
    exit 1
  fi
}

pytest() { # name, arguments
  local name=$1
  shift
  sanitized "$name" "$python" -m pytest -q -p no:cacheprovider --no-header tests/sanitize/loaded.py
  sanitized "$name" "$python" -m pytest -q -p no:cacheprovider --no-header "$@"
}

# Without the tests of nothing but unusual values: no address and no thread depends on them.
ops=(tests/test_conv2d.py tests/test_conv2d_winograd.py tests/test_unfold.py tests/test_max_pool2d.py tests/test_focal_loss.py
  tests/test_sigmoid_focal_loss.py -m "exact or special or layout"
  -k "not special_values and not special_logits and not extreme_logits")

address() {
  # Null pointers and the ends of objects AddressSanitizer finds as well, at less cost.
  build address \
    "-fsanitize=address,undefined -fno-sanitize=vptr,null,object-size -fno-sanitize-recover=all \
     -DDLOPS_PLAYED_TILES -I$root/tests/tiles"
  must_be_found address heap-buffer-overflow "$python" tests/sanitize/faults.py overflow
  must_be_found address "runtime error" "$python" tests/sanitize/faults.py misaligned
  local capability runs=()
  for capability in default avx2 avx512; do
    grep -qw "${capability/avx512/avx512vl}" /proc/cpuinfo || [ "$capability" = default ] || continue
    runs+=("address_$capability")
  done
  side_by_side address_others address_bfloat16 "${runs[@]}"
}
address_default() { ATEN_CPU_CAPABILITY=default pytest address "${ops[@]}"; }
address_avx2() { ATEN_CPU_CAPABILITY=avx2 pytest address "${ops[@]}"; }
address_avx512() { ATEN_CPU_CAPABILITY=avx512 pytest address "${ops[@]}"; }
# Multiplied as it is: the machine's own choice may be float32.
address_bfloat16() {
  local bfloat16=(tests/test_conv2d.py -k "bfloat16 and (exact or layout)")
  if grep -qw avx512_bf16 /proc/cpuinfo; then
    DLOPS_CPU_AVX512_BF16=1 DLOPS_CPU_AMX=0 pytest address "${bfloat16[@]}"
  fi
  export DLOPS_CPU_AMX=1
  pytest address tests/test_precision.py -k "split or without_parts or same_bits"
  pytest address "${bfloat16[@]}"
}
address_others() { pytest address tests/test_invalid.py tests/fuzz; }

thread() {
  local widest
  widest=$("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
  case $widest in
    AVX512* | AVX2) widest=${widest%%_*} ;;
    *) widest=baseline ;;
  esac
  build thread "-fsanitize=thread -include $root/tests/sanitize/parallel_threads.h \
    -DDLOPS_PLAYED_TILES -I$root/tests/tiles" "$widest"
  DLOPS_SEEDED_RACE=1 must_be_found thread "data race" "$python" tests/sanitize/faults.py race
  echo "==== thread: tests"
  pytest thread "${ops[@]}"
  DLOPS_CPU_AMX=1 pytest thread tests/test_precision.py -k "split or same_bits"
}

# Calls each of these functions, and shows what each printed once it is done. A sanitized program runs
# on one core, but for the few tests of several threads.
side_by_side() {
  local part failed=()
  local -A running
  for part in "$@"; do
    "$part" > "build/sanitize/$part.txt" 2>&1 &
    running[$part]=$!
  done
  for part in "$@"; do
    wait "${running[$part]}" || failed+=("$part")
    printf '==== %s\n' "$part"
    cat "build/sanitize/$part.txt"
  done
  ((${#failed[@]} == 0)) || { echo "sanitize: failed: ${failed[*]}"; return 1; }
}

mkdir -p build/sanitize
side_by_side "${parts[@]}"
echo "sanitize: nothing found"
