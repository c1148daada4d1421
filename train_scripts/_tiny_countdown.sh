# Sourced by the quick start and by the scripts of recipe/dapo that are like it: CountDown for a tiny
# model on a laptop.
# shellcheck shell=bash
source "$(dirname -- "${BASH_SOURCE[0]}")/_tiny.sh"

MAKERS=(examples/data_preprocess/countdown.py examples/tiny_countdown.py examples/tiny_model.py)
LESSON="to search, and to give up too early"
make_data() { # make_data FOLDER SEED
  "$PYTHON" "$REPO/examples/data_preprocess/countdown.py" --generate --local_dir "$1" --seed "$2" \
    --template_type tiny --min_operands 3 --max_operands 3 --max_number 10 --max_target 50 \
    --train_size 1600 --test_size 512
  "$PYTHON" "$REPO/examples/tiny_countdown.py" --local_dir "$1" --seed "$2" \
    --sft_size 44800 --give_up 0.8 --patient 0.2
}

RL+=(
  data.max_prompt_length=16
  data.max_response_length=256
  trainer.total_training_steps=40
)

# run_tiny_dapo ARGUMENT…: RL with DAPO's dynamic sampling and clipping. Its runs share the folder of
# the quick start, and so its warmed-up models.
run_tiny_dapo() {
  NAME=quickstart
  PREFIX=dapo-
  TRAINER=recipe.dapo.main_dapo
  RL+=(
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc
    algorithm.filter_groups.max_num_gen_batches=10
    data.gen_batch_size=64
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.3
    actor_rollout_ref.actor.clip_ratio_c=10.0
  )
  run_tiny "$@"
}
