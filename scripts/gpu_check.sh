#!/usr/bin/env bash
# Settles on a machine with a GPU what a machine without one cannot. Made for one that is lent for a
# quarter of an hour in all, and is bare at each start: two calls, each of which ends by itself and
# brings back what it has found by then.
#
#   scripts/gpu_check.sh first     430 s at most: smoke, tests, benchmarks, memcheck and synccheck
#   scripts/gpu_check.sh second    270 s at most: smoke; the tests that failed or did not run, and
#                                  those of more than 2^31 elements; racecheck and initcheck; benchmarks
#   scripts/gpu_check.sh PART...   some of: build smoke tests large sanitizers benchmarks losses
#                                  implicit_gemm hopper
#
#   build                    scripts/gpu_build.sh, where no usable build was brought along; every call
#                            begins with it
#   smoke                    each op and each way of convolution in a process of its own. A way that
#                            hangs is left out of what follows, one that is wrong out of the benchmarks
#   benchmarks               the ways of convolution side by side, and the other ops, against native;
#                            and which kernels each runs, for how long
#   losses                   the losses against torch.compile, too, with 200,000 classes
#   implicit_gemm, hopper    these ways of convolution alone
#
# Needs no network: python3 with torch, torchvision, numpy, setuptools, ninja, pytest, pytest-xdist,
# hypothesis and matplotlib, nvcc and compute-sanitizer. A step that fails or runs out of time does not
# stop the others; the exit status is 1 where any of them did.
#
#   OUT=folder               where the results go (default benchmarks/results): gpu_check-NAME.json
#                            (steps, tests, machine) and .log, anew after each phase; gpu-*.json and
#                            .png, the benchmarks; with OUT, gpu_check-site.tgz, where it was built here
#   DLOPS_COMMIT=hash        what the results belong to, where the sources came without git
#   GPU_CHECK_SECONDS        time for everything, instead of the above (PARTs: 570)
#   GPU_CHECK_BEFORE=file    what the first call found, for the second (default
#                            benchmarks/results/gpu_check-first.json)
#   PYTHON, CUDA_HOME, TORCH_CUDA_ARCH_LIST       as scripts/gpu_build.sh takes them
set -uo pipefail
set -m  # each step is a process group of its own, and may be interrupted
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
out=$(realpath -m "${OUT:-$root/benchmarks/results}")
work=$root/build/gpu_check
site=$work/site
logs=$work/logs
parts="build smoke tests large sanitizers benchmarks losses implicit_gemm hopper"
ways="im2col implicit_gemm implicit_gemm_wgmma implicit_gemm_tma"
before=
case "${*:-first}" in
  first)
    seconds=430 wanted="smoke tests benchmarks sanitizers" tools="memcheck synccheck"
    after_tests=165 after_benchmarks=40 after_sanitizers=0
    ;;
  second)
    seconds=270 wanted="smoke tests large sanitizers benchmarks" tools="racecheck initcheck"
    after_tests=140 after_benchmarks=0 after_sanitizers=80
    before=${GPU_CHECK_BEFORE:-$root/benchmarks/results/gpu_check-first.json}
    ;;
  *)
    seconds=570 wanted=$* tools="memcheck synccheck racecheck initcheck"
    after_tests=0 after_benchmarks=0 after_sanitizers=0
    ;;
esac
for part in $wanted; do
  if [[ " $parts " != *" $part "* ]]; then
    echo "gpu_check: there is no part $part; first, second, or some of $parts"
    exit 2
  fi
done
deadline=${GPU_CHECK_SECONDS:-$seconds}
report=$out/gpu_check-$(tr ' ' - <<< "${*:-first}")
rm -rf "$logs"
mkdir -p "$out" "$logs"
[ -f "$before" ] || before=

wants() { [[ " $wanted " == *" $1 "* ]]; }

# within MOST RESERVE: seconds for a phase that leaves so many to those after it.
within() {
  local left=$((deadline - SECONDS - $2))
  echo $((left < $1 ? left : $1))
}

note() {
  printf '%s\t%s\t%d\n' "$1" "$2" "$3" >> "$logs/steps.tsv"
  printf '%-32s %-14s %4d s\n' "$1" "$2" "$3"
}
status_of() { awk -F '\t' -v name="$1" '$1 == name { print $2 }' "$logs/steps.tsv"; }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, notes how it went, and leaves nothing
# of it running. The command itself is interrupted first, so that pytest says what it has found.
step() {
  local name=$1 limit=$2 start=$SECONDS status pid
  shift 2
  if ((limit < 5)); then
    note "$name" "no time left" 0
    return 1
  fi
  set -m  # in a subshell too
  timeout --foreground -s INT -k 10 "$limit" "$@" > "$logs/$name.log" 2>&1 < /dev/null &
  pid=$!
  wait "$pid"
  status=$?
  kill -KILL -- "-$pid" 2> /dev/null
  case $status in
    0) status=passed ;;
    124) status="out of time" ;;
    137) status=hung ;;  # interrupting it did not end it: it waits for the device
    *) status="failed ($status)" ;;
  esac
  note "$name" "$status" $((SECONDS - start))
  [ "$status" = passed ]
}

# Everything but the build runs away from the source tree, on what was built. Few threads: many
# processes run side by side.
installed() {
  cd "$site" || exit
  OMP_NUM_THREADS=2 PYTHONPATH=$site:$root:$root/tests:$root/tests/gpu exec "$@"
}

suite() {
  local name=$1 limit=$2 workers=$3 file=$4 chosen=$5
  DLOPS_GPU_RESULTS=$logs/$name.tests DLOPS_GPU_SUITE=$name DLOPS_GPU_BEFORE=$before \
    step "$name" "$limit" bash -c 'installed "$python" -m pytest "$@"' - -q -n "$workers" --tb=short \
    --maxfail=40 -p no:cacheprovider -p gpu_plugin -c "$root/pyproject.toml" "$root/tests/gpu/$file" \
    -k "$chosen"
}

hangs() { [ "$(status_of "smoke_$1")" = hung ]; }
ways_that_work() {
  local way
  for way in $ways; do
    case "$(status_of "smoke_$way")" in "" | passed | "out of time") echo "$way" ;; esac
  done
}

# sanitizer TOOL LIMIT NAME PART...: no finding may name a kernel of ours. initcheck must see every
# kernel, or what others have written counts as not initialised.
sanitizer() {
  local tool=$1 limit=$2 name=$1_$3 only=()
  shift 3
  [ "$tool" = initcheck ] || only=("$filter" kns=dlops)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$name" "$limit" bash -c 'installed compute-sanitizer "$@"' - \
    --tool "$tool" "${only[@]}" --print-limit 20 "$python" "$root/tests/gpu/sanitize.py" "$@"
  if grep -v "Host Frame" "$logs/$name.log" 2> /dev/null | grep -q "dlops::"; then
    note "$name, findings" failed 0
  fi
}

benchmark() {
  local name=$1 limit=$2
  shift 2
  step "benchmarks_$name" "$limit" bash -c 'installed "$python" -m "$@"' - "$1" --seconds 0.05 \
    "${@:2}" --out "$out/gpu-$name"
}

say() { "$python" "$root/scripts/gpu_report.py" "$logs" "$report"; }

export -f installed
export root python site

give_up() {
  tail -n 30 "$logs/$1.log"
  say
  exit 1
}
# Without a device every GPU test would be skipped, and pass.
step device 60 "$python" -c 'import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
print(torch.__version__, torch.cuda.get_device_name())' || give_up device
step build "$(within 330 60)" "$root/scripts/gpu_build.sh" || give_up build
say
if [ -n "${OUT:-}" ] && [ "$site/sources" -nt "$logs/device.log" ]; then
  tar -C "$work" -czf "$out/gpu_check-site.tgz" site
  find "$out/gpu_check-site.tgz" -size +15M -delete  # else nothing may come back
fi

if wants smoke; then
  for part in unfold max_pool2d sigmoid_focal_loss focal_loss $ways; do
    step "smoke_$part" "$(within 30 0)" \
      bash -c 'installed "$python" "$root/tests/gpu/smoke.py" "$1"' - "$part" &
  done
  wait
  say
fi

# Side by side: none of them is timed. The large ones one after the other, for each wants tens of
# gigabytes.
if wants tests; then
  limit=$(within 300 $after_tests)
  suite agreement "$limit" 5 test_agreement.py "" &
  suite modes "$limit" 1 test_modes.py "" &
  suite loss_kernels "$limit" 1 test_losses.py "" &
  suite implicit_gemm "$limit" 3 test_implicit_gemm.py "not hopper and not boxes and not wgmma" &
  # (-k looks among a module's names too, such as pytestmark, and finds tma there.)
  hangs implicit_gemm_wgmma ||
    suite implicit_gemm_wgmma "$limit" 2 test_implicit_gemm.py "wgmma" &
  hangs implicit_gemm_tma ||
    suite implicit_gemm_tma "$limit" 2 test_implicit_gemm.py "(hopper or boxes) and not wgmma" &
  for way in $ways; do
    [ "$way" = im2col ] && chosen="not 2_31" || chosen="conv and not 2_31"
    hangs "$way" || DLOPS_CUDA_CONV2D=$way \
      suite "execution_$way" "$limit" 1 test_execution.py "$chosen" &
  done
fi
if wants large; then
  for way in $ways; do
    [ "$way" = im2col ] && chosen=2_31 || chosen="conv and 2_31"
    hangs "$way" || DLOPS_CUDA_CONV2D=$way \
      suite "large_$way" "$(within 120 $after_tests)" 1 test_execution.py "$chosen"
  done &
fi
if wants tests || wants large; then
  wait
  say
fi

sanitize() {
  local limit tool way filter=--kernel-regex
  limit=$(within 300 $after_sanitizers)
  PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin
  compute-sanitizer --help 2>&1 | grep -q -e --kernel-name && filter=--kernel-name  # its new name
  for tool in $tools; do
    sanitizer "$tool" "$limit" ops unfold max_pool2d sigmoid_focal_loss focal_loss &
    for way in $ways; do
      hangs "$way" || sanitizer "$tool" "$limit" "$way" "$way" &
    done
  done
  wait
  say
}

benchmarks() {
  local all
  all=$(within 600 $after_benchmarks)
  # shellcheck disable=SC2046
  benchmark ways $((all * 5 / 8)) benchmarks.ways --ways $(ways_that_work)
  # shellcheck disable=SC2046
  benchmark kernels $((all / 5 + 10)) benchmarks.kernels --ways $(ways_that_work) \
    --seconds $((all / 5))
  benchmark others "$(within 600 $after_benchmarks)" benchmarks --device cuda --no-compile \
    --only max_pool2d focal_loss unfold --dtype bfloat16 float32
  say
}

for part in $wanted; do
  case $part in
    sanitizers) sanitize ;;
    benchmarks) benchmarks ;;
    losses) benchmark losses "$(within 600 0)" benchmarks --device cuda --only focal_loss --full \
      --dtype bfloat16 float32 ;;
    implicit_gemm) benchmark implicit-gemm "$(within 600 0)" benchmarks.ways --ways implicit_gemm ;;
    hopper) benchmark hopper "$(within 600 0)" benchmarks.ways \
      --ways implicit_gemm_wgmma implicit_gemm_tma ;;
  esac
done

echo
say
echo "written: $report.json, $report.log"
failed=$(grep -vc $'\tpassed\t' "$logs/steps.tsv")
if ((failed > 0)); then
  echo "$failed steps did not pass; $report.log says why:"
  grep -v $'\tpassed\t' "$logs/steps.tsv" | while IFS=$'\t' read -r name status _; do
    printf '\n---- %s: %s\n' "$name" "$status"
    if [ -f "$logs/$name.log" ]; then tail -n 12 "$logs/$name.log"; fi
  done
  exit 1
fi
echo "All steps passed."
