#!/usr/bin/env bash
# The first run on GPUs: climbs by itself, stops where something is wrong, and says what to report.
#
#   bash train_scripts/first_run.sh [--cpu] [--fresh] [--rung N] [--out FOLDER] [key=value …]
#
#   rung 0  what a run needs of this machine: python -m verl.tools.preflight
#   rung 1  a tiny model, with the engine hf
#   rung 2  with vLLM, which gets its weights by the host's memory
#   rung 3  with vLLM, which gets them by CUDA IPC, and with CUDA graphs
#   rung 4  the 3B model, responses of up to 512 tokens: two steps, a save, a resumed third step
#   rung 5  the 3B model, responses of full length (8192 tokens): two steps
#
#   --cpu    a tiny model for rungs 4 and 5, without rung 3: a few minutes on a laptop without a GPU
#   --fresh  run again what has passed before, which else isn't
#   --rung   start with this rung, whether or not it has passed before
#   --out    where all files go [outputs/first-run, with --cpu outputs/first-run-cpu]
#
# key=value is an override for all rungs. Environment: MODEL_PATH [Qwen/Qwen2.5-3B], N_GPUS [4, or
# as many as are here; with --cpu: 2 ranks]; others as for the experiments. The environment of Python
# is that of bash setup.sh gpu; with --cpu it is made, unless VERL_PYTHON or PYTHON names one.
HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
if [[ " $* " == *' --cpu '* && " $* " != *' --help '* && " $* " != *' -h '* ]]; then
  [[ ${DRY_RUN:-0} != 0 || -n ${VERL_PYTHON:-${PYTHON:-}} ]] ||
    bash "$HERE/../setup.sh" cpu --vllm --trainer-only || exit
fi
source "$HERE/_common.sh"
if asks_for_help "$@"; then
  first_comment "$0"
  exit
fi
exec "$PYTHON" -m verl.tools.first_run "$@"
