#!/usr/bin/env bash
# Starts the LaTeX server:  bash server/math/start.sh [option of server.py …]
#
# Runs it with MATH_SERVER_PYTHON, else with .venv-server, else with python3.
set -euo pipefail
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
PYTHON=${MATH_SERVER_PYTHON:-$HERE/../../.venv-server/bin/python}
[[ -n ${MATH_SERVER_PYTHON:-} || -x $PYTHON ]] || PYTHON=python3
needed='"math_verify", "starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"'
if ! "$PYTHON" -c "from importlib.util import find_spec as f; assert all(map(f, [$needed]))" \
  2>/dev/null; then
  echo "start.sh: $PYTHON lacks the server's packages: bash setup.sh --server-only" >&2
  exit 1
fi
exec "$PYTHON" "$HERE/server.py" "$@"
