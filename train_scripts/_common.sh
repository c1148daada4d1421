# Sourced by the scripts beside it: what the CountDown and the math experiments have in common.
#
# Environment (the defaults in brackets):
#   N_GPUS      GPUs of each node [4]
#   NNODES      nodes; more than 1 need a running Ray cluster, named by RAY_ADDRESS [1]
#   MODEL_PATH  model folder or hub name; BASE_MODEL is another name for it [Qwen/Qwen2.5-3B]
#   DATA_DIR    folder of the parquet files [~/data/countdown_nochat, ~/data/open_reasoner_zero_nochat]
#   VERL_PYTHON or PYTHON
#               interpreter [.venv/bin/python of this repository where there is one, else python3]
#   DRY_RUN     1: print the resolved configuration as YAML and stop
# Arguments of a script are overrides (key=value) and win over what stands here.
# shellcheck shell=bash
set -euo pipefail

REPO=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
PYTHON=${VERL_PYTHON:-${PYTHON:-}}
if [[ -z $PYTHON && -x $REPO/.venv/bin/python ]]; then
  PYTHON=$REPO/.venv/bin/python
elif ! "${PYTHON:=python3}" -c 'import hydra, omegaconf' 2>/dev/null; then
  printf 'error: %s lacks the packages that verl needs: run bash setup.sh gpu (or cpu) first\n' \
    "$PYTHON" >&2
  exit 1
fi
# The working directory stays the caller's, so that relative paths mean what they say.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

# run_countdown OVERRIDE…
run_countdown() {
  local dir=${DATA_DIR:-$HOME/data/countdown_nochat}
  _run \
    "data.train_files='$dir/train.parquet'" \
    "data.val_files='$dir/test.parquet'" \
    data.max_prompt_length=256 \
    actor_rollout_ref.rollout.max_num_batched_tokens=8448 \
    trainer.save_freq=1000 \
    "$@"
}

# run_math OVERRIDE…
run_math() {
  local dir=${DATA_DIR:-$HOME/data/open_reasoner_zero_nochat}
  local tests="'$dir/test1.parquet','$dir/test2.parquet'"
  tests+=",'$dir/test_amc.parquet','$dir/test_minerva.parquet'"
  _run \
    "data.train_files='$dir/train.parquet'" \
    "data.val_files=[$tests]" \
    data.max_prompt_length=1024 \
    actor_rollout_ref.rollout.max_num_batched_tokens=9216 \
    trainer.save_freq=2000 \
    "$@"
}

# _run OVERRIDE…: the settings of both tasks, then the given ones. The run is named after the script.
_run() {
  local settings=(
    algorithm.adv_estimator=grpo
    algorithm.kl_ctrl.kl_coef=0.0
    data.train_batch_size=128
    data.max_response_length=8192
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
    actor_rollout_ref.rollout.n=10
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8
    actor_rollout_ref.rollout.enable_chunked_prefill=False
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
    actor_rollout_ref.rollout.val_kwargs.n=8
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1
    critic.optim.lr=1e-6
    "trainer.logger=['console','wandb']"
    trainer.project_name=LatestVerlExperiment
    "trainer.experiment_name=$(basename -- "$0" .sh)"
    "trainer.n_gpus_per_node=${N_GPUS:-4}"
    "trainer.nnodes=${NNODES:-1}"
    trainer.total_epochs=15
    trainer.val_before_train=True
    trainer.test_freq=50
    trainer.default_hdfs_dir=null
  )
  exec "$PYTHON" -m verl.trainer.main_ppo "${settings[@]}" "$@"
}
