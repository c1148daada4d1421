#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. Dr. GRPO: no division by length or standard deviation.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_countdown algorithm.use_dr_grpo=True "$@"
