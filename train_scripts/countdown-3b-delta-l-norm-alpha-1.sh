#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. ∆L Normalization with α = 1.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_countdown algorithm.use_grpopp=True algorithm.grpopp_config.alpha=1 "$@"
