# Sourced by the scripts that train a tiny model on the CPU of a laptop, from nothing to a report:
# arguments, environment, folders, warm-up, RL, table.
#
# Such a script begins with the text of its --help, may change the variables below, defines
#   make_data FOLDER SEED  writes model/, sft.parquet, train.parquet and test.parquet into FOLDER
# and ends with run_tiny "$@".
# shellcheck shell=bash
set -euo pipefail

HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)

NAME=$(basename -- "$0" .sh) # of the folder in outputs/, and of the project
TRAINER=verl.trainer.main_ppo
MAKERS=()    # the Python files that make_data needs: the warm-up is made anew when they change
PREFIX=''    # of the run's name
LESSON=''    # what the warm-up teaches, in words
AUTOSTART='' # yes: start a LaTeX server for the time of the RL part
METHOD=delta-l-norm ALPHA=0.75 # defaults of --method and --alpha
method='' alpha='' seed=0 out='' fresh='' extra=() # what arguments change
WARM_UP=(
  data.train_batch_size=32
  data.max_length=256
  optim.lr=4e-3
  "optim.betas=[0.9,0.95]"
  optim.lr_warmup_steps=50
  optim.warmup_style=linear
  trainer.total_epochs=1
  trainer.n_gpus_per_node=2
  trainer.device=cpu
)
RL=(
  data.apply_chat_template=False
  data.train_batch_size=32
  actor_rollout_ref.model.enable_gradient_checkpointing=False
  actor_rollout_ref.actor.ppo_mini_batch_size=32
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
  actor_rollout_ref.actor.optim.lr=1.5e-4
  "actor_rollout_ref.actor.optim.betas=[0.9,0.95]"
  actor_rollout_ref.rollout.name=hf
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.val_kwargs.n=1
  actor_rollout_ref.rollout.val_kwargs.do_sample=True
  actor_rollout_ref.rollout.val_kwargs.temperature=1
  "trainer.logger=[console]"
  trainer.n_gpus_per_node=2
  trainer.device=cpu
  trainer.test_freq=10
  trainer.save_freq=10
  trainer.max_actor_ckpt_to_keep=1
)

# run_tiny ARGUMENT…: everything
run_tiny() {
  read_arguments "$@"
  add_method
  find_environment
  name_run
  # An error in the overrides shows here, before anything is made.
  configuration=$(DRY_RUN=${dry_run/#0/quiet} "$PYTHON" -m "$TRAINER" "${RL[@]}")
  if [[ $dry_run != 0 ]]; then
    printf '%s\n' "$configuration"
    return
  fi
  run_dir=$(resolved trainer default_local_dir) # an override may have moved it
  run_dir=${run_dir/#\~\//$HOME/}
  if [[ $fresh ]]; then
    [[ $run_dir == "$out/$run" ]] || die "--fresh deletes no folder that you chose: delete $run_dir"
    rm -rf "$run_dir"
  elif [[ -e $run_dir/summary.txt ]]; then
    echo "This run is finished; --fresh starts it anew, --seed and --method make others."
    show
    return
  fi
  warm_up
  train
  show
  printf '  altogether  %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

help() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//; p;};}' "$0"
  cat <<HELP

  --method  delta-l-norm, dapo-norm, grpo-norm, dr-grpo-norm or dr-grpo [$METHOD]
  --alpha   exponent of delta-l-norm [$ALPHA]
  --seed    of the problems, the weights and the sampling [0]
  --out     folder for everything that is made [one in outputs/ of this repository]
  --fresh   start this run anew; the warmed-up model stays
  key=value overrides of the RL part's configuration

It makes the Python environment (unless VERL_PYTHON or PYTHON names an interpreter). Stopped midway,
the same command goes on from the last checkpoint; after a finished run it shows the result again.
DRY_RUN=1 prints the configuration of the RL part and makes nothing.
HELP
}

read_arguments() {
  method=$METHOD
  while (($#)); do
    case $1 in
      --method | --alpha | --seed | --out)
        (($# >= 2)) || die "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
      --method=* | --alpha=* | --seed=* | --out=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
      --fresh) fresh=yes && shift ;;
      -h | --help) help && exit ;;
      -*) die "there is no option $1; see --help" ;;
      *=*) extra+=("$1") && shift ;;
      *) die "$1 is neither an option nor an override (key=value); see --help" ;;
    esac
  done
  [[ $seed =~ ^[0-9]+$ ]] || die "--seed $seed: a whole number, 0 or more"
  seed=$((10#$seed))
  [[ -z $alpha || $method == delta-l-norm ]] || die "--alpha belongs to --method delta-l-norm"
}

add_method() {
  local override
  for override in ${extra[@]+"${extra[@]}"}; do
    case $override in
      *.use_grpopp=* | *.use_dr_grpo=* | *.grpopp_config.alpha=* | *.loss_agg_mode=*)
        die "$override: here --method and --alpha choose the aggregation, and name the run"
        ;;
    esac
  done
  run=$PREFIX$method
  case $method in
    delta-l-norm)
      RL+=(algorithm.use_grpopp=True "algorithm.grpopp_config.alpha=${alpha:=$ALPHA}")
      run+=-$alpha
      ;;
    dapo-norm) RL+=(actor_rollout_ref.actor.loss_agg_mode=token-mean) ;;
    grpo-norm) RL+=(actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean) ;;
    dr-grpo-norm) RL+=(algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0) ;;
    dr-grpo) RL+=(algorithm.use_dr_grpo=True) ;;
    *) die "--method $method: choose one of delta-l-norm, dapo-norm, grpo-norm, dr-grpo-norm, dr-grpo" ;;
  esac
}

find_environment() {
  dry_run=${DRY_RUN:-0}
  unset DRY_RUN
  if [[ $dry_run == 0 ]]; then
    [[ -n ${VERL_PYTHON:-${PYTHON:-}} ]] || bash "$HERE/../setup.sh" cpu --trainer-only
    [[ -z $AUTOSTART || -n ${MATH_SERVER_PYTHON:-} ]] || bash "$HERE/../setup.sh" --server-only
  fi
  source "$HERE/_common.sh"
  export OMP_WAIT_POLICY=PASSIVE # threads that spin while they wait cost far more than they gain
  export TOKENIZERS_PARALLELISM=false
  export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
  export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 # no warning about GPUs that nobody asked for
  export PYTHONUNBUFFERED=1
}

digest() { printf '%s\n' "$@" | cksum | awk '{ printf "%08x", $1 }'; }

# Settings that differ never share a folder: $warm of the warm-up, $out/$run of the RL part.
name_run() {
  local makers reward='' override
  out=${out:-$REPO/outputs/$NAME}
  [[ $out == /* ]] || out=$PWD/$out
  makers=$(cat "${MAKERS[@]/#/$REPO/}")
  warm=warm-up-seed-$seed-$(digest "$(declare -f make_data)" "${WARM_UP[@]}" "$makers")
  RL+=("data.seed=$seed" "actor_rollout_ref.rollout.seed=$seed" "trainer.project_name=$NAME")
  RL+=(${extra[@]+"${extra[@]}"})
  # A reward function that was edited makes another run.
  for override in ${extra[@]+"${extra[@]}"}; do
    [[ $override != custom_reward_function.path=* || ! -f ${override#*=} ]] ||
      reward=$(cksum <"${override#*=}")
  done
  run+=-seed-$seed-$(digest "$warm" "${RL[@]}" ${reward:+"$reward"})
  warm=$out/$warm
  RL=(
    "data.train_files='$warm/train.parquet'"
    "data.val_files='$warm/test.parquet'"
    "actor_rollout_ref.model.path='$warm/sft/huggingface'"
    "trainer.experiment_name='$run'"
    "trainer.default_local_dir='$out/$run'"
    "trainer.rollout_data_dir='$out/$run/rollouts'"
    "trainer.validation_data_dir='$out/$run/validation'"
    ${AUTOSTART:+reward_model.math_server.autostart=True} # makes no other run
    "${RL[@]}"
  )
}

resolved() { # resolved SECTION KEY
  "$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)[sys.argv[1]][sys.argv[2]])' "$@" \
    <<<"$configuration"
}

warm_up() {
  if [[ -d $warm ]]; then
    echo "[1/3] The warmed-up model of an earlier run: $warm"
    return
  fi
  # Made aside and renamed: a folder of that name is a finished one.
  mkdir -p "$out"
  work=$out/.warm-up-$$
  trap 'rm -rf "$work"' EXIT
  echo "[1/3] Problems, a tiny model, and text for its warm-up"
  make_data "$work" "$seed"
  echo "[2/3] Warm-up: learns $LESSON; about two minutes"
  "$PYTHON" -m verl.trainer.main_sft \
    "data.train_files='$work/sft.parquet'" "model.path='$work/model'" "data.seed=$seed" \
    "trainer.default_local_dir='$work/sft'" "${WARM_UP[@]}" |
    grep --line-buffered -v '^the model is in ' # not for long
  [[ -d $warm ]] || mv "$work" "$warm"
  echo "      kept for the next time: $warm"
}

train() {
  if [[ -e $run_dir/latest_checkpointed_iteration.txt ]]; then
    echo "[3/3] RL with $method, on from the last checkpoint in $run_dir"
  else
    echo "[3/3] RL with $method; Ctrl-C stops it, and the same command goes on"
  fi
  "$PYTHON" -m "$TRAINER" "${RL[@]}"
  echo
  "$PYTHON" -m verl.tools.report "$run_dir" -o "$run_dir/report.html" --title "$run" \
    >"$run_dir/summary.txt.tmp"
  mv "$run_dir/summary.txt.tmp" "$run_dir/summary.txt"
}

show() {
  cat "$run_dir/summary.txt"
  printf '\n  report      %s\n  everything  %s\n' "$run_dir/report.html" "$run_dir"
}
