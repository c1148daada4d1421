#!/usr/bin/env bash
# Math, Qwen2.5-3B. Dr. GRPO: no division by length or standard deviation.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_math algorithm.use_dr_grpo=True "$@"
