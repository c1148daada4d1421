#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. DAPO with ∆L Normalization, α = 1.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_common.sh"
run_dapo_countdown algorithm.use_grpopp=True algorithm.grpopp_config.alpha=1 "$@"
