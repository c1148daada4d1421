#!/usr/bin/env bash
# Math, Qwen2.5-3B. GRPO Norm: the mean over responses of the mean over their tokens.
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
run_math actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean "$@"
