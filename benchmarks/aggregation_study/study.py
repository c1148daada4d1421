"""The aggregation study: trains with every aggregation, measures the noise of their gradients, and
writes what came out, with its spread, to results/.

    .venv/bin/python benchmarks/aggregation_study/study.py [--seeds 5] [--steps 40] [--batches 32]

Resumable: what is finished is not done again. Runs lie in outputs/aggregation_study. `--quick`
tries the whole way in a few minutes (results go to the runs' folder), which finds nothing out.

Any other methods can be compared, too, by what they learn alone:

    .venv/bin/python benchmarks/aggregation_study/study.py --small --seeds 2 --methods \
        grpo-norm "delta-l-norm 0.75" "grpo-norm gspo" "own.py:weights loss_mode=own.py:loss"

A method is a few words, in any order: a METHOD of the quick start and its alpha (`0.75`, or
`alpha=auto`), a policy loss, an advantage estimator, and `key=value`, where the end of a key is
enough. What all of them share can be given after `--`. `--small` takes ten steps of 128 responses
on one process: quick, and coarse.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.insert(0, str(REPO))

from benchmarks.aggregation_study import findings  # noqa: E402
from benchmarks.aggregation_study.comparison import arguments_of, compare  # noqa: E402
from benchmarks.aggregation_study.gradients import METHODS, Measurement, measure  # noqa: E402

TRAINED = "∆L 0.75"
"""Gradients are measured on the warmed-up policy, and on the one that this method has trained."""

SMALL = """
    trainer.test_freq=5 trainer.val_before_train=False trainer.n_gpus_per_node=1
    trainer.save_freq=-1 trainer.save_hf_model=False data.train_batch_size=16
    actor_rollout_ref.actor.ppo_mini_batch_size=4 data.val_max_samples=256
    actor_rollout_ref.rollout.val_kwargs.n=2
"""
"""Settings of `--small`: four optimizer steps a batch, so that losses with a ratio differ."""


@dataclass(frozen=True)
class Run:
    """One training run of the quick start's task."""

    arguments: tuple[str, ...]

    def script(self, **variables: str) -> str:
        """Runs the quick start; what it prints."""
        command = ["bash", str(REPO / "train_scripts" / "quickstart.sh"), *self.arguments]
        result = subprocess.run(
            command,
            env=os.environ | {"VERL_PYTHON": sys.executable} | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed\n{result.stdout}")
        return result.stdout

    def config(self) -> str:
        """Its resolved configuration, YAML."""
        return self.script(DRY_RUN="1")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--steps", type=int, help="training steps of a run [40, small: 10]")
    parser.add_argument("--small", action="store_true", help="a small part of the task")
    parser.add_argument(
        "--batches", type=int, default=32, help="batches whose gradients are compared"
    )
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "aggregation_study")
    parser.add_argument("--quick", action="store_true", help="one seed, two steps, three batches")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="compare these instead")
    parser.add_argument("shared", nargs="*", metavar="key=value", help="after --: of all runs")
    args = parser.parse_args()
    args.shared = [*SMALL.split(), *args.shared] if args.small else args.shared
    args.steps = args.steps or (10 if args.small else 40)
    results = HERE / "results"
    if args.quick:
        args.seeds, args.steps, args.batches = 1, 2, 3
        args.out = results = args.out / "quick"
    scripts = {m.name: m.script for m in METHODS}
    if args.methods:
        scripts = {words: arguments_of(words) for words in args.methods}
    seeds = range(args.seeds)
    runs = {(name, s): _run(script, s, args) for s in seeds for name, script in scripts.items()}
    folders = {}
    for number, (key, run) in enumerate(runs.items(), 1):
        print(f"[{number}/{len(runs)}] {key[0]}, seed {key[1]}", flush=True)
        folders[key] = Path(_trainer(run)["default_local_dir"])
        print("\n".join(run.script().splitlines()[-12:]), flush=True)
        if args.methods:
            compare(args.out, folders)
    if args.methods:
        return
    measurements = _measure(runs, folders, args)
    findings.write(results, folders, measurements, vars(args))
    print(f"the findings are in {results / 'README.md'}")


def _run(script: tuple[str, ...], seed: int, args: argparse.Namespace) -> Run:
    arguments = (
        *script,
        "--seed",
        str(seed),
        "--out",
        str(args.out),
        f"trainer.total_training_steps={args.steps}",
        f"trainer.test_freq={max(1, args.steps // 8)}",
        # Four answers to each of the 512 problems.
        "actor_rollout_ref.rollout.val_kwargs.n=4",
        *args.shared,
    )
    return Run(arguments)


def _trainer(run: Run) -> dict[str, Any]:
    return yaml.safe_load(run.config())["trainer"]


def _measure(
    runs: dict[tuple[str, int], Run], folders: dict[tuple[str, int], Path], args: argparse.Namespace
) -> dict[tuple[str, int], Measurement]:
    """Measurements by (policy, seed); as many at a time as there are cores, a thread each."""
    folder = args.out / f"gradients-{args.batches}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for seed in range(args.seeds):
        run = runs[TRAINED, seed]
        config = run.config()
        start = yaml.safe_load(config)["actor_rollout_ref"]["model"]["path"]
        trained = folders[TRAINED, seed] / "huggingface"
        for name, path in ("warmed-up", start), (f"after {args.steps} steps", str(trained)):
            jobs[name, seed] = config, path
    paths = {key: folder / f"{key[0].replace(' ', '-')}-seed-{key[1]}.npz" for key in jobs}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = {
            key: pool.submit(
                measure, config, path, args.batches, key[1], f"{key[0]}, seed {key[1]}"
            )
            for key, (config, path) in jobs.items()
            if not paths[key].exists()
        }
        for key, future in futures.items():
            future.result().save(paths[key])
    return {key: Measurement.load(path) for key, path in paths.items()}


if __name__ == "__main__":
    main()
