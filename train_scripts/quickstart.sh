#!/usr/bin/env bash
# ∆L Normalization at work on a laptop: CountDown with a tiny model, on the CPU, in a few minutes.
#
#   bash train_scripts/quickstart.sh [--method METHOD] [--alpha A] [--seed N] [--out DIR] [--fresh]
#                                    [key=value …]
#
# It draws the problems, warms a tiny model up on search traces (kept for the next time), trains it
# with RL, and ends with a table and a picture.
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
run_tiny "$@"
