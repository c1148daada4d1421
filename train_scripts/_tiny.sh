# Sourced, with a task of examples/tiny_run.py and the arguments of the script, by the scripts that
# train a tiny model on the CPU of a laptop: makes the environment and starts that program.
# shellcheck shell=bash
set -euo pipefail
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)

# Neither --help nor DRY_RUN makes anything.
if [[ ${DRY_RUN:-0} == 0 && " $* " != *' --help '* && " $* " != *' -h '* ]]; then
  [[ -n ${VERL_PYTHON:-${PYTHON:-}} ]] || bash "$HERE/../setup.sh" cpu --trainer-only
  [[ $1 != math || -n ${MATH_SERVER_URL:-}${MATH_SERVER_PYTHON:-} ]] ||
    bash "$HERE/../setup.sh" --server-only
fi
source "$HERE/_common.sh"
if asks_for_help "$@"; then
  first_comment "$0"
  printf '\n%s\n\n' 'It makes the Python environment, in the folder VENV if that is set,
unless VERL_PYTHON or PYTHON names an interpreter.'
fi
exec "$PYTHON" "$REPO/examples/tiny_run.py" "$@"
