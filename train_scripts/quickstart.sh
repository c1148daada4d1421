#!/usr/bin/env bash
# ∆L Normalization at work on a laptop: CountDown with a tiny model, on the CPU, in a few minutes.
#
#   bash train_scripts/quickstart.sh [--method METHOD] [--alpha A] [--lora] [--seed N] [--out DIR]
#                                    [--fresh] [key=value …]
#
# It draws the problems, warms a tiny model up on search traces (kept for the next time), trains it
# with RL, and ends with a table and a report.
source "$(dirname -- "${BASH_SOURCE[0]}")/_tiny.sh" countdown "$@"
