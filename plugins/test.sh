#!/usr/bin/env bash
# Tests the plug-ins with the trainers they are for:  bash plugins/test.sh [--short] [argument of pytest …]
#
# Makes what is missing: this project's environment (setup.sh), and under .venv-plugins one with TRL
# and one with verl and SkyRL, from the package index, some GB. No GPU is needed.
#
#   --short     a few cases, in a minute or two, and only if the environments are there already
#
#   PLUGIN_ENVS another place than .venv-plugins
#   PYTHON      interpreter for the environments [python3.11]; of pip's variables PIP_EXTRA_INDEX_URL
#               may name PyTorch's index of CPU wheels, as for setup.sh
set -euo pipefail
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
export PLUGIN_ENVS=${PLUGIN_ENVS:-$REPO/.venv-plugins}
ours=${VERL_PYTHON:-${VENV:-$REPO/.venv}/bin/python}

declare -A packages=(
  [trl]="torch==2.13.0 setuptools>=77 trl==1.16.0 transformers==5.24.*"
  # The last line: what these two import beside what their metadata names.
  [verl]="torch==2.13.0 setuptools>=77 verl==0.9.1
    cachetools fastapi uvicorn TransferQueue==0.1.11 loguru jaxtyping"
)
declare -A alone=([trl]='' [verl]="skyrl==0.3.0 skyrl-gym==0.4.0") # without dependencies: some GB more

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
  exit
elif [[ ${1:-} == --short ]]; then
  shift
  export PLUGIN_SHORT=1
fi

for name in trl verl; do
  venv=$PLUGIN_ENVS/$name
  contents="${packages[$name]} ${alone[$name]}"
  if [[ $(cat "$venv/contents" 2>/dev/null) != "$contents" ]]; then
    if [[ ${PLUGIN_SHORT:-} ]]; then
      echo "left out: the plug-ins' tests; bash plugins/test.sh makes $venv"
      exit
    fi
    echo "test.sh: making $venv"
    "${PYTHON:-python3.11}" -m venv "$venv"
    read -ra names <<<"${packages[$name]//$'\n'/ }"
    "$venv/bin/python" -m pip install -q "${names[@]}"
    read -ra names <<<"${alone[$name]}"
    ((!${#names[@]})) || "$venv/bin/python" -m pip install -q --no-deps "${names[@]}"
    echo "$contents" >"$venv/contents"
  fi
  # As a user gets it: a wheel, not this folder. A wheel's files of before are not to be in it.
  rm -rf "$REPO/plugins/build"
  "$venv/bin/python" -m pip install -q --no-deps --no-index --no-build-isolation --force-reinstall \
    "$REPO/plugins"
done
[[ -x $ours ]] || bash "$REPO/setup.sh" cpu --dev --trainer-only

cd "$REPO"
OMP_NUM_THREADS=1 "$ours" -m pytest plugins/tests "$@"
