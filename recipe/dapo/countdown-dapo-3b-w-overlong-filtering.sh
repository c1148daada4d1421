#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. DAPO with overlong filtering: truncated responses don't count.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_common.sh"
run_dapo_countdown algorithm.filter_overlong_response.enable=True "$@"
