"""How long one waits: for an import, for a dry run, and for the first step of a tiny real run.

    .venv/bin/python benchmarks/start.py [--quick]

The run is real: two actor ranks (FSDP2), two engines, 16 prompts with 4 responses of at most 24
tokens, on a random model of two layers. Processes start anew for each figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import alternate, report_limit, spread

NAME = "start"
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "train_scripts/countdown-3b-delta-l-norm-alpha-1.sh"
REWARD = "def score(solution_str): return len(solution_str)"


def run(*command: str, **variables: str) -> str:
    """Standard output of a command in the repository, with this interpreter and code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "VERL_PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings | variables, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
    return result.stdout


def make_inputs(folder: Path) -> list[str]:
    """Model, prompts and reward of the tiny run; its overrides."""
    sys.path.insert(0, str(ROOT))
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.helpers import make_tiny_model

    make_tiny_model(folder / "model")
    rule = {"style": "rule", "ground_truth": ""}
    rows = [
        {
            "data_source": "any",
            "prompt": f"{i} + {i} =",
            "reward_model": rule,
            "extra_info": {"i": i},
        }
        for i in range(32)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD)
    return [
        f"data.train_files={folder}/train.parquet",
        f"custom_reward_function.path={folder}/reward.py",
        "custom_reward_function.name=score",
        "data.apply_chat_template=False",
        "data.train_batch_size=16",
        "data.max_prompt_length=16",
        "data.max_response_length=24",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=4",
        "trainer.logger=console",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=2",
        "trainer.val_before_train=False",
        "trainer.total_training_steps=1",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/run",
    ]


def first_step(overrides: list[str]) -> None:
    """What `main_ppo` does, in this process; prints the seconds of each part."""
    start = time.perf_counter()
    parts: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - begin

        return wrapper

    def load_everything() -> Any:
        from verl.trainer.ppo import ray_trainer

        return ray_trainer

    from verl.config.load import load_config

    config = timed("configuration", load_config)(overrides)
    module = timed("imports", load_everything)()
    from verl.models.hf import load_tokenizer

    begin = time.perf_counter()
    tokenizer = load_tokenizer(config.actor_rollout_ref.model)
    trainer = module.RayPPOTrainer(config, tokenizer)
    parts["tokenizer, data"] = time.perf_counter() - begin
    from verl.trainer.ppo import workers

    workers.start_ray = timed("Ray", workers.start_ray)
    workers.reserve_devices = timed("placement", workers.reserve_devices)
    engines, ranks = workers.EnginePool, workers.WorkerGroup
    engines.wait_ready = timed("processes, engines", engines.wait_ready)
    ranks.connect = timed("actor ranks meet", ranks.connect)
    trainer_start = time.perf_counter()
    trainer.start_workers()
    known = sum(parts[n] for n in ("Ray", "placement", "processes, engines", "actor ranks meet"))
    parts["actor's model, optimizer"] = time.perf_counter() - trainer_start - known
    timed("first step", trainer.fit)()
    parts["sum"] = time.perf_counter() - start
    begin = time.perf_counter()
    trainer.close()
    import ray

    ray.shutdown()
    parts["end"] = time.perf_counter() - begin
    print("parts", json.dumps(parts))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--first-step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        first_step(options.first_step)
        return
    times = alternate(
        {
            "python": lambda: run(sys.executable, "-c", "pass"),
            "import verl": lambda: run(sys.executable, "-c", "import verl"),
            "dry run": lambda: run("bash", SCRIPT, DRY_RUN="1"),
        },
        3 if options.quick else 10,
    )
    for name, seconds in times.items():
        print(f"{name:28}{spread(seconds)}", flush=True)
    alone = median(times["import verl"]) - median(times["python"])
    report_limit(NAME, "seconds of `import verl` beyond Python's own start", alone, "<= 0.3")
    report_limit(NAME, f"seconds of DRY_RUN=1 bash {SCRIPT}", median(times["dry run"]), "<= 3")
    all_parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        for i in range(1 if options.quick else 3):
            begin = time.perf_counter()
            output = run(sys.executable, __file__, "--first-step", *inputs)
            print(f"first step {i + 1}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
            line = next(x for x in output.splitlines() if x.startswith("parts "))
            for name, seconds in json.loads(line.removeprefix("parts ")).items():
                all_parts.setdefault(name, []).append(seconds)
    print("from the start to the end of the first step:")
    for name, seconds in all_parts.items():
        print(f"  {name:26}{spread(seconds)}")
    report_limit(NAME, "seconds to the first step of a tiny run", median(all_parts["sum"]), "<= 30")


if __name__ == "__main__":
    main()
