#!/usr/bin/env bash
# Settles on a machine with a GPU what a machine without one cannot: builds dlops with CUDA, runs the
# GPU tests, the op tests on the CPU, compute-sanitizer and the benchmarks. Needs no network: python3
# with torch, torchvision, numpy, setuptools, ninja, pytest, pytest-xdist, hypothesis, matplotlib,
# and nvcc must be there. Ends within ten minutes; a step that fails or runs out of time does not
# stop the others. Exits with 1 where any of them did.
#
#   scripts/gpu_check.sh [build] [tests] [sanitizers] [benchmarks] [losses] [implicit_gemm] [hopper]
#                                                                                    (default: all)
#
# All of it takes longer than that on most machines: call it for the first three, whose build the
# later calls find, and then for each of the others. Each call leaves eight files at most.
#
#   benchmarks               the default kernels against native
#   losses                   the losses against torch.compile, too, with 200,000 classes
#   implicit_gemm, hopper    convolution without a column matrix; hopper's by wgmma and by the TMA
#
#   OUT=folder               where the results go (default benchmarks/results)
#   DLOPS_COMMIT=hash        what the results belong to, where the sources came without git
#   PYTHON=path              the Python to use (default python3)
#   TORCH_CUDA_ARCH_LIST     what to build for (default 9.0a)
#   GPU_CHECK_SECONDS        time for everything (default 570)
#
# Writes gpu_check-PARTS.json (steps, tests, machine), gpu_check-PARTS.log (what each step printed) and,
# for each dtype, the benchmarks' table as JSON and picture.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
out=$(realpath -m "${OUT:-$root/benchmarks/results}")
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))
wanted=${*:-build tests sanitizers benchmarks losses implicit_gemm hopper}
report=$out/gpu_check-$(tr ' ' - <<< "${*:-all}")
work=$root/build/gpu_check
site=$work/site
logs=$work/logs
mkdir -p "$out" "$site"
rm -rf "$logs"
mkdir -p "$logs"

wants() { [[ " $wanted " == *" $1 "* ]]; }

# step NAME LIMIT COMMAND...: runs it within LIMIT seconds and before the deadline, notes how it went.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  local left=$((deadline - SECONDS))
  if ((left < 5)); then
    status="no time left"
  else
    timeout -k 10 "$((limit < left ? limit : left))" "$@" > "$logs/$name.log" 2>&1 < /dev/null
    status=$?
    case $status in
      0) status=passed ;;
      124 | 137) status="out of time" ;;
      *) status="failed ($status)" ;;
    esac
  fi
  printf '%s\t%s\t%d\n' "$name" "$status" $((SECONDS - start)) >> "$logs/steps.tsv"
  printf '%-32s %-14s %4d s\n' "$name" "$status" $((SECONDS - start))
  [ "$status" = passed ]
}

# Everything but the build runs away from the source tree, on what was installed.
installed() {
  cd "$site" || exit
  PYTHONPATH=$site:$root:$root/tests:$root/tests/gpu exec "$@"
}

run_pytest() {
  local name=$1
  shift
  installed "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
    --junitxml="$logs/$name.xml" "$@"
}

# The program must come to its end, and no finding may name a kernel of ours; what the tool has to say
# of the libraries' kernels is in the log.
sanitizer() {
  local tool=$1 log=$logs/sanitizer_$1.txt
  PATH=$PATH:/usr/local/cuda/bin PYTORCH_NO_CUDA_MEMORY_CACHING=1 installed \
    compute-sanitizer --tool "$tool" "$python" "$root/tests/gpu/sanitize.py" > "$log" 2>&1
}
check_sanitizer() {
  (sanitizer "$1")
  local log=$logs/sanitizer_$1.txt
  head -c 30000 "$log"
  echo "..."
  tail -n 5 "$log"
  grep -q "sanitize: done" "$log" && grep -q "ERROR SUMMARY\|RACECHECK SUMMARY" "$log" &&
    ! grep -v "Host Frame" "$log" | grep -q "dlops::"
}

summary() {
  "$python" - "$logs" "$report.json" "$root" << 'PY'
import json, os, platform, subprocess, sys
import xml.etree.ElementTree as xml
from datetime import datetime, timezone
from pathlib import Path

logs, path, root = map(Path, sys.argv[1:])

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

names = ("tests", "failures", "errors", "skipped")
suites = {file.stem: next(xml.parse(file).iter("testsuite")) for file in sorted(logs.glob("*.xml"))}
lines = (logs / "steps.tsv").read_text().splitlines()
results = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "commit": os.environ.get("DLOPS_COMMIT") or said("git", "-C", str(root), "rev-parse", "HEAD"),
    "python": platform.python_version(),
    "versions": said(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)"),
    "nvcc": (said("nvcc", "--version") or "").splitlines()[-2:-1],
    "gpu": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    "steps": [dict(zip(("name", "status", "seconds"), line.split("\t"))) for line in lines],
    "tests": {name: {key: int(suite.get(key)) for key in names} for name, suite in suites.items()},
    "failed_tests": [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites.values()
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ],
}
path.write_text(json.dumps(results, indent=1) + "\n")
for name, counts in results["tests"].items():
    print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in counts.items()))
for name in results["failed_tests"][:40]:
    print("FAILED", name)
print("written:", path)
PY
}

export -f installed run_pytest sanitizer check_sanitizer
export root python site logs

# Without a device every GPU test would be skipped, and pass.
step device 60 "$python" -c 'import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
print(torch.__version__, torch.cuda.get_device_name())'
if wants build; then
  step build 330 env DLOPS_CUDA=1 "$python" -m pip --disable-pip-version-check install --no-index \
    --no-build-isolation --no-deps --upgrade --target "$site" "$root"
  step report 60 bash -c 'installed "$python" -m dlops'
fi
if wants tests; then
  # Side by side: none of them is timed.
  step gpu_native 280 bash -c 'run_pytest gpu_native "$root/tests/gpu/test_agreement.py" -k test_native' &
  step gpu_agreement 280 bash -c \
    'run_pytest gpu_agreement "$root/tests/gpu/test_agreement.py" -k "not test_native"' &
  step gpu_implicit_gemm 280 bash -c 'run_pytest gpu_implicit_gemm \
    "$root/tests/gpu/test_implicit_gemm.py" -k "not (hopper or boxes or wgmma)"' &
  step gpu_hopper 280 bash -c 'run_pytest gpu_hopper "$root/tests/gpu/test_implicit_gemm.py" \
    -k "hopper or boxes or wgmma"' &
  step gpu_modes 280 bash -c 'run_pytest gpu_modes "$root/tests/gpu/test_modes.py"' &
  # One after the other: each wants tens of gigabytes.
  for way in implicit_gemm implicit_gemm_wgmma implicit_gemm_tma; do
    DLOPS_CUDA_CONV2D=$way step "gpu_execution_$way" 100 bash -c \
      "run_pytest gpu_execution_$way \"\$root/tests/gpu/test_execution.py\" -k conv"
  done &
  step gpu_execution 280 bash -c 'run_pytest gpu_execution "$root/tests/gpu/test_execution.py"' &
  for name in conv2d unfold max_pool2d sigmoid_focal_loss focal_loss; do
    step "cpu_$name" 280 bash -c "run_pytest cpu_$name \"\$root/tests/test_$name.py\"" &
  done
fi
if wants sanitizers; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" 280 bash -c "check_sanitizer $tool" &
  done
fi
wait
benchmark() {
  local name=$1
  shift
  step "benchmarks_$name" 240 bash -c "installed \"\$python\" -m benchmarks --device cuda $* \
    --seconds 0.1 --out $(printf %q "$out")/gpu-$name"
}
if wants benchmarks; then
  benchmark bfloat16 --dtype bfloat16 --no-compile
  benchmark float32 --dtype float32 --no-compile
fi
if wants losses; then
  benchmark losses-bfloat16 --dtype bfloat16 --only focal_loss --full
  benchmark losses-float32 --dtype float32 --only focal_loss --full
fi
if wants implicit_gemm; then
  DLOPS_CUDA_CONV2D=implicit_gemm benchmark implicit-gemm-bfloat16 --dtype bfloat16 --only conv2d
  DLOPS_CUDA_CONV2D=implicit_gemm benchmark implicit-gemm-tf32 --dtype float32 --tf32 --only conv2d
fi
if wants hopper; then
  DLOPS_CUDA_CONV2D=implicit_gemm_wgmma benchmark wgmma-bfloat16 --dtype bfloat16 --only conv2d
  DLOPS_CUDA_CONV2D=implicit_gemm_tma benchmark tma-bfloat16 --dtype bfloat16 --only conv2d
  DLOPS_CUDA_CONV2D=implicit_gemm_tma benchmark tma-tf32 --dtype float32 --tf32 --only conv2d
fi

for log in "$logs"/*.log "$logs"/sanitizer_*.txt; do
  [ -f "$log" ] || continue
  printf '\n======== %s\n' "$(basename "$log" .log)"
  tail -c 60000 "$log"
done > "$report.log"
echo
summary
failed=$(grep -vc $'\tpassed\t' "$logs/steps.tsv")
if ((failed > 0)); then
  echo "$failed steps did not pass; $report.log says why:"
  grep -v $'\tpassed\t' "$logs/steps.tsv" | while IFS=$'\t' read -r name status _; do
    printf '\n---- %s: %s\n' "$name" "$status"
    if [ -f "$logs/$name.log" ]; then tail -n 15 "$logs/$name.log"; fi
  done
  exit 1
fi
echo "All steps passed."
