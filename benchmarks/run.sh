#!/usr/bin/env bash
# All benchmarks, one after the other, and one table of their targets at the end.
#
#   bash benchmarks/run.sh [--quick] [NAME …]      NAME: controller, start, … [all]
#
#   --quick   fewer repeats, smaller sizes: all together under 5 minutes on two idle cores
#
# A target that is not met is shown. A benchmark that fails is named, and the exit status is 1.
# A peer that is not installed is left out, with a line: vLLM comes with bash setup.sh cpu --vllm, TRL
# with .venv/bin/python benchmarks/vs_trl.py --setup (in .venv-trl, or TRL_PYTHON). latex_server and latex_attack run
# in .venv-server, or with the interpreter MATH_SERVER_PYTHON, and gets fastapi there, for the server
# that it compares with.
set -euo pipefail
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
source "$HERE/../train_scripts/_common.sh"
cd "$REPO"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_DISABLE_PROGRESS_BARS=1
server=${MATH_SERVER_PYTHON:-$REPO/.venv-server/bin/python}

quick=() names=()
for argument in "$@"; do
  case $argument in
    --quick) quick=(--quick) ;;
    -h | --help) first_comment "$0" && exit ;;
    -*) echo "run.sh: unknown option $argument; bash benchmarks/run.sh [--quick] [NAME …]" >&2 && exit 2 ;;
    *)
      [[ -e benchmarks/$argument.py ]] || { echo "run.sh: there is no benchmarks/$argument.py" >&2 && exit 2; }
      names+=("$argument")
      ;;
  esac
done
if ((!${#names[@]})); then
  names=(controller start rollout update shared_prompt logprob_memory vs_trl simulate_cluster memory_model)
  names+=(latex_server latex_attack)
fi

output=$(mktemp)
trap 'rm -f "$output"' EXIT
failed=()
for name in "${names[@]}"; do
  python=$PYTHON
  if [[ $name == latex_* ]]; then
    python=$server
    if [[ ! -x $python ]]; then
      failed+=("$name: there is no $python (bash setup.sh --server-only)")
      continue
    fi
    if ! "$python" -c 'import fastapi' 2>/dev/null &&
      ! "$python" -m pip install -q fastapi -c server/math/requirements.txt; then
      failed+=("$name: $python can't get fastapi (bash setup.sh --server-only)")
      continue
    fi
  fi
  printf '\n== %s\n' "$name"
  started=$SECONDS
  "$python" "benchmarks/$name.py" "${quick[@]}" | tee -a "$output" || failed+=("$name")
  printf '%s took %d s\n' "$name" $((SECONDS - started))
done

printf '\n== targets\n'
"$PYTHON" - "$output" <<'PYTHON'
import sys

rows = [line.split(" | ") for line in open(sys.argv[1]) if line.startswith(("ratio | ", "limit | "))]
rows = [[cell.strip() for cell in row] for row in rows]
widths = [max(map(len, column)) for column in zip(*rows)]
for row in rows:
    cells = [cell.rjust(w) if i == 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
    print(" | ".join(cells).rstrip())
PYTHON
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
