#!/usr/bin/env bash
# Makes the environment .venv:  bash setup.sh [cpu|gpu]
#
#   cpu  the trainer, the hf engine and the tests; what the quick start uses [default]
#   gpu  the same with vLLM, for CUDA
#
# Does nothing where .venv is up to date. PYTHON names the interpreter to start from; else it is the
# first of python3.11, python3.12, python3.13, python3 that will do.
#
# The usual Linux wheel of PyTorch carries CUDA (some GB). Where no GPU is, set PIP_EXTRA_INDEX_URL to
# PyTorch's own index of CPU wheels, and the same release comes from there (some 200 MB).
set -euo pipefail
exec </dev/null # nothing here asks; and a closed stdin would lend its number to some other file

TORCH=torch==2.13.0 # of cpu: the release the tests ran with. For gpu, vLLM chooses.
CPU_GB=6 GPU_GB=20  # disk that a fresh environment and its downloads take

REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
VENV=$REPO/.venv

say() { printf 'setup: %s\n' "$*"; }

die() {
  printf 'setup: error: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '       %s\n' "$@" >&2
  exit 1
}

# What a finished environment was made from; it holds absolute paths, so the folder counts as well.
fingerprint() {
  printf '%s %s' "$1" "$({ cat "$REPO/pyproject.toml" "$REPO/setup.sh" && echo "$REPO"; } | cksum)"
}

is_ready() { # is_ready MODE
  [[ -f $VENV/setup-stamp && $(<"$VENV/setup-stamp") == "$(fingerprint "$1")" ]] &&
    "$VENV/bin/python" -c '' 2>/dev/null
}

# Prints an interpreter that can make the environment. Runs each candidate: a shim may be a dud.
find_python() {
  local python too_old='' no_venv='' candidates=(python3.11 python3.12 python3.13 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    "$python" -c '' 2>/dev/null || continue
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      too_old=$("$python" --version 2>&1)
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      no_venv=$python
    else
      printf '%s' "$python"
      return
    fi
  done
  [[ -z $no_venv ]] || die "$no_venv can't make virtual environments" \
    "install its venv module (on Debian and Ubuntu: apt install python3-venv)"
  die "Python 3.11 or newer is needed${too_old:+, but this is $too_old}" \
    "install one, or name it: PYTHON=/path/to/python3.11 bash setup.sh"
}

check_disk() { # check_disk GIGABYTES
  local free
  free=$(df -Pk "$REPO" | awk 'NR == 2 { print int($4 / 1e6) }')
  ((free >= $1)) || die "$free GB free in $REPO, but the environment takes up to $1 GB"
}

# pip's output goes to a file, one short line for each larger download to the screen.
install() { # install REQUIREMENT…
  local log=$VENV/setup.log
  if ! "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check "$@" 2>&1 |
    tee "$log" |
    awk '/^ *Downloading .*[MG]B\)/ { sub(/.*\//, "", $2); split($2, part, "-")
                                        print "  " part[1], part[2], $3, $4; fflush() }
         /^Installing collected/ { print "  unpacking"; fflush() }'; then
    tail -n 20 "$log" >&2
    die "pip failed; all of its output: $log"
  fi
}

check() {
  "$VENV/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import platform
import sys

import ray, torch, transformers  # noqa: E401
import verl.trainer.config  # noqa: F401

try:
    vllm = f"yes, {metadata.version('vllm')}"
except metadata.PackageNotFoundError:
    vllm = "no"
gpus = torch.cuda.device_count()
table = {
    "Python": platform.python_version(),
    "PyTorch": torch.__version__,
    "device": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "cpu",
    "transformers": transformers.__version__,
    "Ray": ray.__version__,
    "vLLM": vllm,
    "location": sys.prefix,
}
for name, value in table.items():
    print(f"  {name:<14}{value}")
PYTHON
}

main() {
  local mode=${1:-cpu} current python
  case $mode in
    cpu | gpu) (($# <= 1)) || die "usage: bash setup.sh [cpu|gpu]" ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$REPO/setup.sh"
      return
      ;;
    *) die "usage: bash setup.sh [cpu|gpu]" ;;
  esac
  # One at a time in this folder, where the system has a lock for that.
  if command -v flock >/dev/null; then
    exec 9<"$REPO"
    flock 9 || true
  fi
  current=$(cat "$VENV/setup-mode" 2>/dev/null || true)
  # The gpu environment does all that the cpu one does.
  [[ $current != gpu ]] || mode=gpu
  if is_ready "$mode"; then
    say ".venv is up to date"
    return
  fi
  python=$(find_python)
  # Another mode means other builds of the same releases, which pip would take for installed.
  if [[ $current != "$mode" ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    if [[ $mode == cpu ]]; then check_disk $CPU_GB; else check_disk $GPU_GB; fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
    echo "$mode" >"$VENV/setup-mode"
  fi
  rm -f "$VENV/setup-stamp"
  say "installing packages ($mode); the first time this takes some minutes"
  cd "$REPO"
  if [[ $mode == cpu ]]; then
    install "$TORCH" -e '.[dev]'
  else
    install -e '.[gpu,dev]'
  fi
  say "checking"
  check || die "the packages are installed but don't load (see above)"
  fingerprint "$mode" >"$VENV/setup-stamp"
  say "done in $SECONDS s"
}

main "$@"
