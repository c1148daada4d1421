#!/usr/bin/env bash
# All checks: style, types, scripts, tests.  bash tests/run.sh [argument of pytest …]
#
# Makes .venv first, unless VERL_PYTHON or PYTHON names an interpreter that has it all.
set -euo pipefail
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
[[ -n ${VERL_PYTHON:-${PYTHON:-}} ]] || bash "$HERE/../setup.sh" cpu
source "$HERE/../train_scripts/_common.sh"
cd "$REPO"

failed=()
# check NAME COMMAND…: goes on after a failure, so that one run shows them all.
check() {
  printf '== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}

shellcheck=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck
selection=(-m "not gpu")
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  selection=(-m "gpu or not gpu")
fi

check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
check mypy "$PYTHON" -m mypy
check shellcheck find . \( -name '.venv*' -o -name outputs \) -prune -o \
  \( -name '*.sh' -o -path ./.ci/run \) -exec "$shellcheck" -x -P SCRIPTDIR {} +
check pytest "$PYTHON" -m pytest "${selection[@]}" "$@"
if [[ -x .venv-server/bin/python ]]; then
  check "pytest of the LaTeX server" .venv-server/bin/python -m pytest \
    --confcutdir=tests/server tests/server
fi

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
