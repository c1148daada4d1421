#!/usr/bin/env bash
# Math, Qwen2.5-3B. DAPO without soft punishment and without overlong filtering.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../train_scripts/_common.sh"
run_dapo_math "$@"
