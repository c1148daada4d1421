#!/usr/bin/env bash
# All checks: style, types, scripts, tests.  bash tests/run.sh [argument of the trainer's pytest …]
#
# Of long series of like tests, those marked `series`, a sample runs that changes with the day; --all
# runs everything, and --sample-seed DATE repeats the sample of a day.
#
# Makes the environments first, unless VERL_PYTHON or PYTHON names an interpreter that has all that
# the trainer needs. The LaTeX server's is MATH_SERVER_PYTHON, else that of .venv-server.
set -euo pipefail
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)

if [[ " $* " == *' --help '* || " $* " == *' -h '* ]]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
  exit
fi

# The tests of the report's page want a browser, and are skipped without one. It comes while the
# environments are made.
browser() {
  command -v chromium chromium-browser google-chrome >/dev/null && return
  [[ $EUID == 0 ]] && command -v apt-get >/dev/null || return 0
  echo "run.sh: installing Chromium"
  { timeout 60 apt-get update -q && DEBIAN_FRONTEND=noninteractive timeout 180 \
    apt-get install -qy --no-install-recommends chromium; } >/dev/null ||
    echo "run.sh: Chromium can't be installed; its tests are skipped" >&2
}
browser &
if [[ -z ${VERL_PYTHON:-${PYTHON:-}} ]]; then
  bash "$HERE/../setup.sh" cpu --vllm --dev ${MATH_SERVER_PYTHON:+--trainer-only}
fi
wait
source "$HERE/../train_scripts/_common.sh"
cd "$REPO"
export MATH_SERVER_PYTHON=${MATH_SERVER_PYTHON:-$REPO/.venv-server/bin/python}
if ! "$MATH_SERVER_PYTHON" -c 'import math_verify, pytest' 2>/dev/null; then
  echo "run.sh: $MATH_SERVER_PYTHON lacks what the LaTeX server's tests need:" \
    "bash setup.sh --dev --server-only" >&2
  exit 1
fi

printed=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$printed"' EXIT
# check NAME COMMAND…: goes on after a failure, so that one run shows them all.
check() {
  printf '== %s\n' "$1"
  "${@:2}" || echo "failed: $1" >>"$printed/failed"
}

shellcheck=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck
# Three tests at a time: none keeps two cores busy from start to end. On a GPU, which they would
# share, one after the other.
selection=(-m "not gpu" -n 3 --dist loadfile --no-loadscope-reorder) gpu=
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  selection=(-m "gpu or not gpu") gpu=1
fi

check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
# What keeps one core busy runs beside the trainer's tests, which don't keep two busy all the time.
{
  check mypy "$PYTHON" -m mypy
  check shellcheck find . \( -name '.venv*' -o -name outputs \) -prune -o \
    \( -name '*.sh' -o -path ./.ci/run \) -exec "$shellcheck" -x -P SCRIPTDIR {} +
  check "pytest of the LaTeX server" "$MATH_SERVER_PYTHON" -m pytest \
    --confcutdir=tests/server tests/server
  [[ $gpu ]] || check "pytest of vLLM" "$PYTHON" -m pytest tests/vllm
} >"$printed/beside" 2>&1 &
check pytest "$PYTHON" -m pytest "${selection[@]}" --durations=15 "$@"
wait
cat "$printed/beside"
[[ ! $gpu ]] || check "pytest of vLLM" "$PYTHON" -m pytest tests/vllm
check "pytest of the plug-ins" bash plugins/test.sh --short

if [[ -f $printed/failed ]]; then
  cat "$printed/failed"
  exit 1
fi
