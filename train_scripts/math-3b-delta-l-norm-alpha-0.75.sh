#!/usr/bin/env bash
# Math, Qwen2.5-3B. ∆L Normalization with α = 0.75.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_math algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0.75 "$@"
