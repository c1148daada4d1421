#!/usr/bin/env bash
# The math path on a laptop: a tiny model learns to solve for x, and the LaTeX server judges.
#
#   bash train_scripts/math-tiny-delta-l-norm-alpha-0.75.sh [--method METHOD] [--alpha A]
#                                    [--seed N] [--out DIR] [--fresh] [key=value …]
#
# It draws equations and inequalities, warms a tiny model up on their solutions (kept for the next
# time), trains it with RL, and ends with a table and a report. The judge is the server at
# MATH_SERVER_URL where that is set; else one is started and ended with the RL part.
source "$(dirname -- "${BASH_SOURCE[0]}")/_tiny.sh" math "$@"
