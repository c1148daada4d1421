#!/usr/bin/env bash
# DAPO at work on a laptop: the quick start's task with dynamic sampling and token-mean loss.
#
#   bash recipe/dapo/countdown-dapo-tiny-wo-sp-wo-of.sh [--method METHOD] [--alpha A]
#                                    [--seed N] [--out DIR] [--fresh] [key=value …]
#
# It uses the quick start's problems and warmed-up model, makes them where they are missing, trains
# with RL, and ends with a table and a report.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_tiny.sh" countdown-dapo "$@"
