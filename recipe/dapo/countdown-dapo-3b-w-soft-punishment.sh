#!/usr/bin/env bash
# CountDown, Qwen2.5-3B. DAPO with soft overlong punishment.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_common.sh"
run_dapo_countdown reward_model.overlong_buffer.enable=True "$@"
