#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. DAPO Norm, the default: the mean over all tokens.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_countdown "$@"
