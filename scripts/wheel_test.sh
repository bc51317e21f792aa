#!/usr/bin/env bash
# Tests what ships: builds the sdist and the wheel, installs the wheel into an environment of its own
# and runs the tests there, away from the source tree. What the usual build has compiled is not
# compiled again; that the sdist has every source is a test of tests/test_build.py.
#
#   scripts/wheel_test.sh [python [pytest arguments...]]
#
# The new environment borrows torch and the test tools from the given Python's, so that gigabytes are
# not installed twice; dlops itself comes from the wheel alone. BESIDE="folders..." are copied with the
# tests, so that those which need them run too.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
shift || true

work=$PWD/build/wheel-test
rm -rf "$work"
mkdir -p "$work"

rm -rf build/lib.*  # modules that are no longer there would be in the wheel
"$python" -m build --no-isolation --sdist --wheel --outdir "$work/dist" .
"$python" scripts/check_wheel.py "$work"/dist/dlops-*.whl
"$python" -m venv "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed.pth"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --no-deps --ignore-installed \
  "$work"/dist/dlops-*.whl

away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
# shellcheck disable=SC2086
cp -r tests docs pyproject.toml ${BESIDE:-} "$away"
cd "$away"
"$work/venv/bin/python" - "$site" <<'PY'
import sys
import dlops
assert dlops.__file__.startswith(sys.argv[1]), f"{dlops.__file__} is not the wheel's"
PY
"$work/venv/bin/python" -m dlops
"$work/venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder tests "$@"
