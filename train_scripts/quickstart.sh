#!/usr/bin/env bash
# ∆L Normalization at work on a laptop: CountDown with a tiny model, on the CPU, in a few minutes.
#
#   bash train_scripts/quickstart.sh [--method METHOD] [--alpha A] [--seed N] [--out DIR] [--fresh]
#                                    [key=value …]
#
#   --method  delta-l-norm, dapo-norm, grpo-norm, dr-grpo-norm or dr-grpo [delta-l-norm]
#   --alpha   exponent of delta-l-norm [0.75]
#   --seed    of the problems, the weights and the sampling [0]
#   --out     folder for everything that is made [outputs/quickstart in this repository]
#   --fresh   start this run anew; the warmed-up model stays
#   key=value overrides of verl.trainer.main_ppo
#
# It makes the Python environment (unless VERL_PYTHON or PYTHON names an interpreter), draws the
# problems, warms a tiny model up on search traces (kept for the next time), trains it with RL, and
# ends with a table and a picture. Stopped midway, the same command goes on from the last checkpoint;
# after a finished run it shows the result again. DRY_RUN=1 prints the configuration of the RL part
# and makes nothing.
set -euo pipefail

# --- The task: problems, model, warm-up, RL ---------------------------------------------------------

PROBLEMS=(
  --template_type tiny --min_operands 3 --max_operands 3 --max_number 10 --max_target 50
  --train_size 1600 --test_size 512
)
MODEL=(--sft_size 44800 --give_up 0.8 --patient 0.2)
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
  data.max_prompt_length=16
  data.max_response_length=256
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
  trainer.project_name=quickstart
  "trainer.logger=[console]"
  trainer.n_gpus_per_node=2
  trainer.device=cpu
  trainer.total_training_steps=40
  trainer.test_freq=10
  trainer.save_freq=10
  trainer.max_actor_ckpt_to_keep=1
)

# --- Arguments --------------------------------------------------------------------------------------

HERE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

method=delta-l-norm alpha='' seed=0 out='' fresh='' extra=()
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
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}" && exit ;;
    -*) die "there is no option $1; see --help" ;;
    *=*) extra+=("$1") && shift ;;
    *) die "$1 is neither an option nor an override (key=value); see --help" ;;
  esac
done
[[ $seed =~ ^[0-9]+$ ]] || die "--seed $seed: a whole number, 0 or more"
seed=$((10#$seed))
[[ -z $alpha || $method == delta-l-norm ]] || die "--alpha belongs to --method delta-l-norm"
run=$method
case $method in
  delta-l-norm)
    RL+=(algorithm.use_grpopp=True "algorithm.grpopp_config.alpha=${alpha:=0.75}")
    run+=-$alpha
    ;;
  dapo-norm) RL+=(actor_rollout_ref.actor.loss_agg_mode=token-mean) ;;
  grpo-norm) RL+=(actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean) ;;
  dr-grpo-norm) RL+=(algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0) ;;
  dr-grpo) RL+=(algorithm.use_dr_grpo=True) ;;
  *) die "--method $method: choose one of delta-l-norm, dapo-norm, grpo-norm, dr-grpo-norm, dr-grpo" ;;
esac

# --- Environment ------------------------------------------------------------------------------------

dry_run=${DRY_RUN:-0}
unset DRY_RUN
if [[ -z ${VERL_PYTHON:-${PYTHON:-}} && $dry_run == 0 ]]; then
  bash "$HERE/../setup.sh" cpu --trainer-only
fi
source "$HERE/_common.sh"

export OMP_WAIT_POLICY=PASSIVE # threads that spin while they wait cost far more than they gain
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 # no warning about GPUs that nobody asked for
export PYTHONUNBUFFERED=1

# --- Folders: settings that differ never share one ---------------------------------------------------

digest() { printf '%s\n' "$@" | cksum | awk '{ printf "%08x", $1 }'; }

out=${out:-$REPO/outputs/quickstart}
[[ $out == /* ]] || out=$PWD/$out
examples=$REPO/examples
makers=$(cat "$examples/data_preprocess/countdown.py" "$examples/tiny_countdown.py")
warm=warm-up-seed-$seed-$(digest "${PROBLEMS[@]}" "${MODEL[@]}" "${WARM_UP[@]}" "$makers")
RL+=("data.seed=$seed" "actor_rollout_ref.rollout.seed=$seed" ${extra[@]+"${extra[@]}"})
reward='' # a reward function that was edited makes another run
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
  "${RL[@]}"
)

# An error in the overrides shows here, before anything is made.
configuration=$(DRY_RUN=1 "$PYTHON" -m verl.trainer.main_ppo "${RL[@]}")
if [[ $dry_run != 0 ]]; then
  printf '%s\n' "$configuration"
  exit
fi
resolved() { # resolved SECTION KEY
  "$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)[sys.argv[1]][sys.argv[2]])' "$@" \
    <<<"$configuration"
}
run_dir=$(resolved trainer default_local_dir) # an override may have moved it
run_dir=${run_dir/#\~\//$HOME/}

show() {
  cat "$run_dir/summary.txt"
  printf '\n  picture     %s\n  everything  %s\n' "$run_dir/plot.png" "$run_dir"
}

if [[ $fresh ]]; then
  [[ $run_dir == "$out/$run" ]] || die "--fresh deletes no folder that you chose: delete $run_dir"
  rm -rf "$run_dir"
elif [[ -e $run_dir/summary.txt ]]; then
  echo "This run is finished; --fresh starts it anew, --seed and --method make others."
  show
  exit
fi

# --- Problems, model, warm-up -----------------------------------------------------------------------

if [[ -d $warm ]]; then
  echo "[1/3] The warmed-up model of an earlier run: $warm"
else
  # Made aside and renamed: a folder of that name is a finished one.
  mkdir -p "$out"
  work=$out/.warm-up-$$
  trap 'rm -rf "$work"' EXIT
  echo "[1/3] Problems, a tiny model, and search traces for its warm-up"
  "$PYTHON" "$examples/data_preprocess/countdown.py" --generate --local_dir "$work" --seed "$seed" \
    "${PROBLEMS[@]}"
  "$PYTHON" "$examples/tiny_countdown.py" --local_dir "$work" --seed "$seed" "${MODEL[@]}"
  echo "[2/3] Warm-up: learns to search, and to give up too early; about two minutes"
  "$PYTHON" -m verl.trainer.main_sft \
    "data.train_files='$work/sft.parquet'" "model.path='$work/model'" "data.seed=$seed" \
    "trainer.default_local_dir='$work/sft'" "${WARM_UP[@]}" |
    grep --line-buffered -v '^the model is in ' # not for long
  [[ -d $warm ]] || mv "$work" "$warm"
  echo "      kept for the next time: $warm"
fi

# --- RL ---------------------------------------------------------------------------------------------

if [[ -e $run_dir/latest_checkpointed_iteration.txt ]]; then
  echo "[3/3] RL with $method, on from the last checkpoint in $run_dir"
else
  echo "[3/3] RL with $method; Ctrl-C stops it, and the same command goes on"
fi
"$PYTHON" -m verl.trainer.main_ppo "${RL[@]}"

echo
"$PYTHON" -m verl.utils.plot "$run_dir/metrics.jsonl" "$run_dir/plot.png" --title "$run" \
  --max-response-length "$(resolved data max_response_length)" >"$run_dir/summary.txt.tmp"
mv "$run_dir/summary.txt.tmp" "$run_dir/summary.txt"
show
printf '  quick start %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
