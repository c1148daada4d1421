"""Whole training steps against TRL's `GRPOTrainer`, on the CPU.

    .venv/bin/python benchmarks/vs_trl.py [--quick]      (makes .venv-trl on its first run)

Both train the same random Qwen3 policy of 1.8 M parameters (`policies.py`) with the same prompts,
8 responses to each of 32, at most 256 tokens each, the same reward, temperature 1, no KL term, one
update by AdamW a step, in fp32, on two cores. Ours: `python -m verl.trainer.main_ppo`, two ranks
and two `hf` engines. TRL: one process with two threads, transformers' `generate`. Seconds of a step
are those from the end of the step before; the first step doesn't count. Runs alternate.

TRL without gradient checkpointing (its default, slower), in fp32 (its default, bf16, is slower on a
CPU), with the micro-batch that was fastest here. vLLM and Liger kernels are for GPUs; it pads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report, spread

ROOT = Path(__file__).parents[1]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
SIZE, PROMPTS, N, LR = "2M", 32, 8, 1e-6
Step = dict[str, float]
"""Seconds by phase, `step` all of them; `responses`, `length` their mean, `cv` of the lengths."""

REWARD = """
def reward(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count("3") / (1 + len(solution_str))
"""


# TRL, in its own environment.


def run_trl(folder: Path, steps: int, max_tokens: int, micro_batch: int) -> None:
    """Trains and prints a line of JSON per step."""
    import numpy as np
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    scope: dict[str, Any] = {}
    exec(REWARD, scope)
    seconds = {"gen": 0.0, "log_probs": 0.0, "inputs": 0.0, "forward_backward": 0.0}
    lengths: list[int] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [scope["reward"]("", text, "") for text in completions]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            step, self.last = now - self.last, now
            update = seconds["forward_backward"] - seconds["inputs"]
            rest = step - seconds["forward_backward"]
            line = {
                "gen": seconds["gen"],
                "log-probs": seconds["log_probs"],
                "update": update,
                "rest": rest + seconds["inputs"] - seconds["gen"] - seconds["log_probs"],
                "step": step,
                "responses": len(lengths),
                "length": float(np.mean(lengths)),
                "cv": float(np.std(lengths) / np.mean(lengths)),
            }
            print("step", json.dumps(line), flush=True)
            lengths.clear()
            seconds.update(dict.fromkeys(seconds, 0.0))

    rows = (folder / "prompts.json").read_text()
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in json.loads(rows)]),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PROMPTS * N // micro_batch,
            num_generations=N,
            max_completion_length=max_tokens,
            max_steps=steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            beta=0.0,
            temperature=1.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        ),
    )

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return call

    # Within `_prepare_inputs` log-probabilities are those of the policy before the update.
    inside = [False]
    log_probs = timed("log_probs", trainer._get_per_token_logps_and_entropies)
    plain, prepare = trainer._get_per_token_logps_and_entropies, trainer._prepare_inputs

    def prepared(*args: Any) -> Any:
        inside[0] = True
        try:
            return prepare(*args)
        finally:
            inside[0] = False

    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        log_probs if inside[0] else plain
    )(*a, **k)
    trainer._prepare_inputs = timed("inputs", prepared)
    trainer._generate = timed("gen", trainer._generate)
    trainer.training_step = timed("forward_backward", trainer.training_step)
    trainer.train()


def trl_steps(folder: Path, steps: int, max_tokens: int, micro_batch: int) -> list[Step]:
    """The steps of a run of TRL, the first one left out."""
    command = [str(TRL_PYTHON), __file__, "--trl", str(folder), "--steps", str(steps)]
    command += ["--max-tokens", str(max_tokens), "--micro-batch", str(micro_batch)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("step ")]
    if done.returncode or len(lines) != steps:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line) for line in lines][1:]


def make_trl_environment() -> None:
    """Installs TRL beside ours, once."""
    done = TRL_PYTHON.parents[1] / "installed"
    if not done.exists():
        print("making .venv-trl", file=sys.stderr)
        folder = TRL_PYTHON.parents[1]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(TRL_PYTHON), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0", "trl==1.16.*"], check=True, stdout=sys.stderr)
        done.touch()


# Ours.


def our_steps(folder: Path, steps: int, max_tokens: int, number: int) -> list[Step]:
    """The steps of a run of `verl.trainer.main_ppo`, the first one left out."""
    from verl.utils.tracking import read_metrics  # not in TRL's environment

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
        "actor_rollout_ref.rollout.n": N,
        "trainer.logger": "console",
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
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, with the first")
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's, in responses")
    parser.add_argument("--max-tokens", type=int, default=256, help=argparse.SUPPRESS)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.max_tokens = 1, 2, 32
    limit, steps = options.max_tokens, options.steps
    if options.trl:
        return run_trl(options.trl, steps, limit, options.micro_batch)
    make_trl_environment()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    runs: dict[str, list[Step]] = {"ours": [], "TRL": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, limit / 4)
        for i in range(options.rounds):
            print(f"round {i + 1}/{options.rounds}", file=sys.stderr)
            runs["ours"] += our_steps(folder, steps, limit, i)
            runs["TRL"] += trl_steps(folder, steps, limit, options.micro_batch)
    rates = {}
    for who, found in runs.items():
        rate = [step["responses"] / step["step"] for step in found]
        rates[who] = statistics.median(rate)
        phases = ("gen", "log-probs", "update", "rest", "length", "cv")
        median = {p: statistics.median(step[p] for step in found) for p in phases}
        print(
            f"{who:5} {spread(rate, 'responses/s')}", *(f"{k} {v:.3g}" for k, v in median.items())
        )
    report(
        "vs_trl.py", "responses/s of whole steps against TRL", rates["ours"] / rates["TRL"], ">= 5"
    )


if __name__ == "__main__":
    main()
