"""Whole training steps against TRL's `GRPOTrainer`, on the CPU.

    .venv/bin/python benchmarks/vs_trl.py --setup        (once: TRL in .venv-trl, minutes)
    .venv/bin/python benchmarks/vs_trl.py [--quick]

Both train the same random Qwen3 policy of 1.8 M parameters (`policies.py`) with the same prompts,
8 responses to each of 32, at most 256 tokens each, the same reward, temperature 1, no KL term, one
update by AdamW a step, in fp32, on two cores. A response ends by chance, so that lengths vary
(coefficient of variation about 0.9; it is printed). Ours: `python -m verl.trainer.main_ppo`, two
ranks and two `hf` engines, compiled where there is a C++ compiler. TRL: one process with two
threads, transformers' `generate`. Seconds of a step are those from the end of the step before; the
first step doesn't count. Runs alternate.

TRL without gradient checkpointing (its default, slower), in fp32 (its default, bf16, is slower on a
CPU), with the micro-batch that was fastest here, padded. TRL with two processes, or with vLLM for
CPU, was not tried; Liger kernels are for GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report, spread

ROOT = Path(__file__).parents[1]
TRL = ROOT / ".venv-trl"
TRL_PYTHON = Path(os.environ.get("TRL_PYTHON", TRL / "bin" / "python"))
SIZE, PROMPTS, N, LR = "2M", 32, 8, 1e-6
PHASES = ("gen", "log-probs", "update", "rest")
Step = dict[str, float]
"""Seconds by phase, `step` all of them; `responses`, `length` their mean, `cv` of the lengths."""

REWARD = """
def reward(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count("3") / (1 + len(solution_str))
"""


# TRL, in its own environment.


def trl_steps(folder: Path, steps: int, max_tokens: int, micro_batch: int) -> list[Step]:
    """The steps of a run of TRL, the first one left out."""
    command = [str(TRL_PYTHON), str(ROOT / "benchmarks/trl_run.py"), str(folder)]
    command += map(str, (steps, max_tokens, micro_batch))
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("step ")]
    if done.returncode or len(lines) != steps:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line) for line in lines][1:]


def make_trl_environment() -> None:
    """Installs TRL beside ours."""
    subprocess.run([sys.executable, "-m", "venv", str(TRL)], check=True)
    pip = [str(TRL / "bin" / "python"), "-m", "pip", "install"]
    subprocess.run([*pip, "torch==2.13.0", "trl==1.16.*", "transformers==5.24.*"], check=True)


# Ours.


def our_steps(folder: Path, steps: int, max_tokens: int, number: int) -> list[Step]:
    """The steps of a run of `verl.trainer.main_ppo`, the first one left out."""
    from verl.trainer.ppo.tracking import read_metrics  # not in TRL's environment
    from verl.utils.device import compiler_available

    out = folder / f"run{number}"
    settings = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "train.parquet",
        "custom_reward_function.path": folder / "reward.py",
        "custom_reward_function.name": "reward",
        "data.apply_chat_template": False,
        "data.train_batch_size": PROMPTS,
        "data.max_prompt_length": 40,
        "data.max_response_length": max_tokens,
        "actor_rollout_ref.model.path": folder / "model",
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 4096,
        "actor_rollout_ref.actor.optim.lr": LR,
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.rollout.enforce_eager": not compiler_available(),
        "actor_rollout_ref.rollout.n": N,
        "trainer.logger": "console",
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 2,
        "trainer.total_training_steps": steps,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.default_local_dir": out,
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += [f"{key}={value}" for key, value in settings.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        times: list[float] = []
        while process.poll() is None:  # a step ends when its line is there
            time.sleep(0.01)
            path = out / "metrics.jsonl"
            if path.exists() and path.read_text().count("\n") > len(times):
                times.append(time.perf_counter())
    records = read_metrics(out / "metrics.jsonl") if not process.returncode else []
    if len(records) != steps or len(times) != steps:
        raise RuntimeError((folder / "log").read_text()[-4000:])
    result = []
    for i, metrics in enumerate(records[1:], 1):
        wall = times[i] - times[i - 1]
        found = {
            "gen": metrics["timing_s/gen"],
            "log-probs": metrics.get("timing_s/old_log_prob", 0.0),
            "update": metrics["timing_s/update_actor"],
        }
        found |= {"rest": wall - sum(found.values()), "step": wall, "responses": PROMPTS * N}
        length = metrics["response_length/mean"]
        result.append(found | {"length": length, "cv": metrics["response_length/cv"]})
    return result


def prepare(folder: Path, mean_length: float) -> None:
    """Model, prompts and reward for both."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from policies import make_policy, make_token_prompts

    make_policy(folder / "model", SIZE, mean_length)
    prompts = make_token_prompts(SIZE, 4 * PROMPTS, longest=40)
    texts = [" ".join(f"t{i}" for i in ids) for ids in prompts]
    (folder / "prompts.json").write_text(json.dumps(texts))
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {
            "data_source": "tokens",
            "prompt": text,
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i, text in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one run of two short steps")
    parser.add_argument("--rounds", type=int, help="runs of each [2; with --quick 1]")
    parser.add_argument("--steps", type=int, help="steps of a run [4; with --quick 2]")
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's, in responses")
    parser.add_argument("--setup", action="store_true", help="make .venv-trl, and nothing else")
    options = parser.parse_args()
    if options.setup:
        return make_trl_environment()
    if not TRL_PYTHON.exists():
        print(f"left out: TRL is not there; {sys.executable} {__file__} --setup makes .venv-trl")
        return
    rounds, steps, limit = (1, 2, 32) if options.quick else (2, 4, 256)
    rounds, steps = options.rounds or rounds, options.steps or steps
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    runs: dict[str, list[Step]] = {"ours": [], "TRL": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, limit / 4)
        for i in range(rounds):
            print(f"round {i + 1}/{rounds}", file=sys.stderr)
            runs["ours"] += our_steps(folder, steps, limit, i)
            runs["TRL"] += trl_steps(folder, steps, limit, options.micro_batch)
    rates = {}
    for who, found in runs.items():
        rate = [step["responses"] / step["step"] for step in found]
        rates[who] = statistics.median(rate)
        shown = {p: statistics.median(step[p] for step in found) for p in (*PHASES, "length", "cv")}
        print(f"{who:5} {spread(rate, 'responses/s')}", *(f"{k} {v:.3g}" for k, v in shown.items()))
    report("vs_trl", "responses/s of whole steps against TRL", rates["ours"] / rates["TRL"], ">= 5")


if __name__ == "__main__":
    main()
