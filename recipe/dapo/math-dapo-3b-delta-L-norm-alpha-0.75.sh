#!/usr/bin/env bash
# Math, Qwen2.5-3B. DAPO with ∆L Normalization, α = 0.75.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_common.sh"
run_dapo_math algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0.75 "$@"
