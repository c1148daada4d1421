# Sourced by the scripts here and in recipe/dapo: what the CountDown and the math experiments have in
# common, and how a run starts.
#
# Environment (the defaults in brackets):
#   N_GPUS      GPUs of each node [4; the scripts of recipe/dapo: 8]
#   NNODES      nodes; more than 1 need a running Ray cluster [1]
#   MODEL_PATH  model folder or hub name; BASE_MODEL is another name for it [Qwen/Qwen2.5-3B]
#   DATA_DIR    folder of the parquet files [~/data/countdown_nochat, ~/data/open_reasoner_zero_nochat]
#   RAY_ADDRESS a running Ray cluster to join, as host:port [none: a Ray that ends with the run]
#   SUBMIT      1: send the run to the job server of a cluster, an http address in RAY_ADDRESS
#               [http://127.0.0.1:8265], and follow it; docs/dapo.md tells what travels along
#   VERL_PYTHON or PYTHON
#               interpreter [bin/python of the folder VENV, else of this repository's .venv, else
#               python3]
#   PUBLISHED   1: all settings as published, also those that only decide about speed and memory [0:
#               what suits the GPU, docs/gpu.md; DRY_RUN=1 names the differences]
#   GPU_GB      size of the GPUs for which memory is estimated; give it where others than this
#               machine's train [those of this machine, else 80]
#   DRY_RUN     1: print the resolved configuration as YAML and stop
#   PREFLIGHT   0: start without a look at this machine's GPUs, driver, compiler, memory and disks
# Arguments of a script are overrides (key=value) and win over what stands here.
# shellcheck shell=bash
set -euo pipefail

# asks_for_help ARGUMENT…: whether they hold --help or -h.
asks_for_help() { [[ " $* " == *' --help '* || " $* " == *' -h '* ]]; }

# first_comment SCRIPT: its --help.
first_comment() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//; p;};}' "$1"; }

GIVEN=("$@") # the arguments of the script that sources this
REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
PYTHON=${VERL_PYTHON:-${PYTHON:-}}
venv=${VENV:-$REPO/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
[[ -n $PYTHON || ! -x $venv/bin/python ]] || PYTHON=$venv/bin/python
PYTHON=${PYTHON:-python3}
# Looked for, not imported: that would take as long as a dry run. --help needs none of them.
if ! asks_for_help "$@" && ! "$PYTHON" -c 'from importlib.util import find_spec as f; f("hydra").name, f("omegaconf").name' \
  2>/dev/null; then
  printf 'error: %s lacks the packages that verl needs: run bash setup.sh gpu (or cpu) first\n' \
    "$PYTHON" >&2
  exit 1
fi
# The working directory stays the caller's, so that relative paths mean what they say.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

# --- Settings ---------------------------------------------------------------------------------------

# Of all experiments. A run is named after its script.
COMMON=(
  algorithm.adv_estimator=grpo
  algorithm.kl_ctrl.kl_coef=0.0
  data.train_batch_size=128
  data.filter_overlong_prompts=True
  data.apply_chat_template=False
  "actor_rollout_ref.model.path='${MODEL_PATH:-${BASE_MODEL:-Qwen/Qwen2.5-3B}}'"
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=32
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
  actor_rollout_ref.actor.clip_ratio_low=0.2
  actor_rollout_ref.actor.clip_ratio_high=0.3
  actor_rollout_ref.actor.entropy_coeff=0.0
  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.kl_loss_coef=0.0
  actor_rollout_ref.actor.kl_loss_type=low_var_kl
  actor_rollout_ref.actor.fsdp_config.param_offload=True
  actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
  actor_rollout_ref.ref.fsdp_config.param_offload=True
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.8
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
  actor_rollout_ref.rollout.val_kwargs.n=8
  actor_rollout_ref.rollout.val_kwargs.do_sample=True
  actor_rollout_ref.rollout.val_kwargs.temperature=1
  "trainer.logger=['console','wandb']"
  trainer.project_name=LatestVerlExperiment
  "trainer.experiment_name=$(basename -- "$0" .sh)"
  "trainer.nnodes=${NNODES:-1}"
  trainer.total_epochs=15
  trainer.test_freq=50
)

# Of the ten in train_scripts.
PPO=(
  data.max_response_length=8192
  actor_rollout_ref.rollout.n=10
  actor_rollout_ref.rollout.enable_chunked_prefill=False
  critic.optim.lr=1e-6
  "trainer.n_gpus_per_node=${N_GPUS:-4}"
  trainer.val_before_train=True
  trainer.default_hdfs_dir=null
)

# Of the eight in recipe/dapo: dynamic sampling, and an overlong punishment that is off until enabled.
DAPO=(
  algorithm.filter_groups.enable=True
  algorithm.filter_groups.max_num_gen_batches=10
  data.gen_batch_size=384
  data.max_response_length=3072
  actor_rollout_ref.actor.clip_ratio_c=10.0
  actor_rollout_ref.rollout.n=8
  reward_model.overlong_buffer.len=2048
  reward_model.overlong_buffer.penalty_factor=1.0
  "trainer.n_gpus_per_node=${N_GPUS:-8}"
  trainer.val_before_train=False
  trainer.save_freq=1000
)

# --- What the scripts call: run_… OVERRIDE… ---------------------------------------------------------

run_countdown() {
  countdown verl.trainer.main_ppo "${COMMON[@]}" "${PPO[@]}" \
    actor_rollout_ref.rollout.max_num_batched_tokens=8448 trainer.save_freq=1000 "$@"
}

run_math() {
  math verl.trainer.main_ppo "${COMMON[@]}" "${PPO[@]}" \
    actor_rollout_ref.rollout.max_num_batched_tokens=9216 trainer.save_freq=2000 "$@"
}

run_dapo_countdown() {
  countdown recipe.dapo.main_dapo "${COMMON[@]}" "${DAPO[@]}" \
    algorithm.filter_groups.metric=acc trainer.total_epochs=1500 trainer.test_freq=25 "$@"
}

run_dapo_math() {
  math recipe.dapo.main_dapo "${COMMON[@]}" "${DAPO[@]}" \
    algorithm.filter_groups.metric=seq_final_reward "$@"
}

# --- The data ---------------------------------------------------------------------------------------

# countdown MODULE OVERRIDE…
countdown() {
  local dir=${DATA_DIR:-$HOME/data/countdown_nochat}
  launch "$1" \
    "data.train_files='$dir/train.parquet'" \
    "data.val_files='$dir/test.parquet'" \
    data.max_prompt_length=256 \
    "${@:2}"
}

# math MODULE OVERRIDE…
math() {
  local dir=${DATA_DIR:-$HOME/data/open_reasoner_zero_nochat}
  local tests="'$dir/test1.parquet','$dir/test2.parquet'"
  tests+=",'$dir/test_amc.parquet','$dir/test_minerva.parquet'"
  launch "$1" \
    "data.train_files='$dir/train.parquet'" \
    "data.val_files=[$tests]" \
    data.max_prompt_length=1024 \
    reward_model.math_server.answer_rule=published \
    "${@:2}"
}

# --- The start --------------------------------------------------------------------------------------

# launch MODULE OVERRIDE…: prints the configuration, sends the run to a cluster, or runs it.
launch() {
  if asks_for_help "$@"; then
    printf '  bash %s [key=value …]\n\n' "$0"
    first_comment "$0"
    echo
    sed -n '4,/^# shellcheck/{/^# shellcheck/d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
    return
  fi
  local config settings overrides=("$@")
  if [[ ${PUBLISHED:-0} == 0 ]]; then
    # If the configuration has an error, the run itself reports it.
    if config=$(DRY_RUN=quiet "$PYTHON" -m "$@" 2>/dev/null); then
      settings=$("$PYTHON" -m verl.tools.gpu_settings ${GIVEN[@]+"${GIVEN[@]}"} <<<"$config")
      [[ -z $settings ]] || mapfile -t -O "${#overrides[@]}" overrides <<<"$settings"
    fi
    set -- ${overrides[@]+"${overrides[@]}"}
  fi
  if [[ ${DRY_RUN:-0} == 0 ]]; then
    [[ ${SUBMIT:-0} == 0 ]] || exec "$PYTHON" "$REPO/train_scripts/_submit.py" "$@"
    if [[ ${RAY_ADDRESS:-} == http* ]]; then
      printf 'error: RAY_ADDRESS=%s is a job server: SUBMIT=1 sends the run there; %s\n' \
        "$RAY_ADDRESS" "to join the cluster from here, give the host:port that 'ray start' printed" >&2
      exit 2
    fi
    if [[ ${PREFLIGHT:-1} != 0 && " $* " != *' trainer.device=cpu '* ]] &&
      { command -v nvidia-smi || [[ -e /proc/driver/nvidia/version ]]; } >/dev/null; then
      if ! "$PYTHON" -m verl.tools.preflight --quick "${@:2}" >&2; then
        echo "error: this machine can't run it (see above); PREFLIGHT=0 starts it all the same" >&2
        exit 1
      fi
    fi
  fi
  exec "$PYTHON" -m "$@"
}
