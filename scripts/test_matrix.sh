#!/usr/bin/env bash
# Builds and tests the two ends of what pyproject.toml supports, each in an environment of its own:
#
#   oldest   the oldest Python here that is supported, every dependency at its lower bound
#   newest   the newest Python here that torch is offered for, every dependency at its upper bound
#
#   scripts/test_matrix.sh [oldest|newest|all [pytest arguments...]]
#
# MATRIX=path is where the environments go (default build/matrix; about 6 GB each, as torch comes with
# CUDA). PYTHONS="..." names the Pythons to choose from, oldest first.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-all}
shift || true
matrix=${MATRIX:-build/matrix}
pythons=${PYTHONS:-python3.11 python3.12 python3.13 python3.14 python3.15}
export DLOPS_CUDA=0 DLOPS_WERROR=1 PIP_PROGRESS_BAR=off PIP_DISABLE_PIP_VERSION_CHECK=1

works() { "$1" -c 'import ensurepip, venv' 2> /dev/null; }

# The first Python of those given that can hold torch.
pick() {
  for python in "$@"; do
    works "$python" || continue
    rm -rf "$matrix/probe"
    "$python" -m venv "$matrix/probe"
    if "$matrix/probe/bin/python" -m pip install --quiet --dry-run --no-deps "$torch" 2> /dev/null; then
      echo "$python"
      return
    fi
  done
  echo "No Python of: $* has the venv module and is one that $torch is offered for." >&2
  return 1
}

lane() {
  local name=$1 flag=$2 python reader env=$matrix/$1
  shift 2
  reader=$(pick_reader)
  torch=$("$reader" scripts/requirements.py $flag | grep '^torch[<>=]')
  # shellcheck disable=SC2046
  if [ "$name" = oldest ]; then python=$(pick $pythons); else python=$(pick $(printf '%s\n' $pythons | tac)); fi
  rm -rf "$matrix/probe"
  printf '\n==== %s: %s, %s\n' "$name" "$("$python" --version)" "$torch"
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  "$env/bin/python" scripts/requirements.py $flag examples test > "$env/requirements.txt"
  "$env/bin/python" -m pip install --quiet -r "$env/requirements.txt" build
  BESIDE="examples benchmarks" scripts/wheel_test.sh "$env/bin/python" "$@"
}

pick_reader() {
  for python in $pythons; do works "$python" && echo "$python" && return; done
}

mkdir -p "$matrix"
[ "$which" = newest ] || lane oldest --oldest "$@"
[ "$which" = oldest ] || lane newest "" "$@"
