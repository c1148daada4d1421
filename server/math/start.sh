#!/usr/bin/env bash
# Starts the LaTeX server:  bash server/math/start.sh [option …]      (--help lists them)
#
# Runs it with MATH_SERVER_PYTHON, else with .venv-server, else with python3.
set -euo pipefail
REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)
PYTHON=${MATH_SERVER_PYTHON:-$REPO/.venv-server/bin/python}
[[ -n ${MATH_SERVER_PYTHON:-} || -x $PYTHON ]] || PYTHON=python3
needed='"math_verify", "starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"'
if ! "$PYTHON" -P -c "from importlib.util import find_spec as f; assert all(map(f, [$needed]))" \
  2>/dev/null; then
  echo "start.sh: $PYTHON lacks the server's packages: bash setup.sh --server-only" >&2
  exit 1
fi
# -P: not from the folder that we are in, whose modules could take the place of others.
PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -P -m server.math "$@"
