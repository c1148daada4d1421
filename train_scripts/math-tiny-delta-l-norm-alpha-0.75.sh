#!/usr/bin/env bash
# The math path on a laptop: a tiny model learns to solve for x, and the LaTeX server judges.
#
#   bash train_scripts/math-tiny-delta-l-norm-alpha-0.75.sh [--method METHOD] [--alpha A]
#                                    [--seed N] [--out DIR] [--fresh] [key=value …]
#
# It draws equations and inequalities, warms a tiny model up on their solutions (kept for the next
# time), trains it with RL, and ends with a table and a report. The judge is the server at
# MATH_SERVER_URL where that is set; else one is started and ended with the RL part.
source "$(dirname -- "${BASH_SOURCE[0]}")/_tiny.sh"

NAME=math-tiny
MAKERS=(examples/tiny_math.py examples/tiny_model.py)
LESSON="to solve step by step, and to guess too early"
make_data() { # make_data FOLDER SEED
  "$PYTHON" "$REPO/examples/tiny_math.py" --local_dir "$1" --seed "$2" \
    --max_terms 16 --sft_size 80000 --give_up 0.6 --patient 0.25 \
    --num_layers 3 --intermediate_size 128
}

WARM_UP+=(data.train_batch_size=64)
RL+=(
  data.max_prompt_length=32
  data.max_response_length=160
  trainer.total_training_steps=60
)
[[ -n ${MATH_SERVER_URL:-} ]] || AUTOSTART=yes
run_tiny "$@"
