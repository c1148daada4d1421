#!/usr/bin/env bash
# Math, Qwen2.5-3B. Dr. GRPO Norm: ∆L Normalization with α = 0.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_math algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0 "$@"
