"""The quick start with `trainer.max_policy_age=k`: accuracy over steps and over time.

    .venv/bin/python benchmarks/policy_age.py [--out DIR] [--seeds 0 1 2] [--ages 0 1 2] [--own]
                                              [--plot FILE]

Engines share the policy's two devices, or with `--own` have one of their own. Seconds are those of
the training steps, without validations. Runs that are finished in DIR are not run again.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import spread
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
ACCURACY = "val-core/countdown/acc/mean@1"
OWN = ("trainer.n_gpus_per_node=1", "trainer.rollout_gpus_per_node=1")
Records = list[dict[str, Any]]
"""`metrics.jsonl` of a run."""


def train(out: Path, age: int, seed: int, own: bool) -> Records:
    """A run, unless it is finished."""
    from verl.trainer.ppo.tracking import read_metrics

    folder = out / f"{'own' if own else 'shared'}-age-{age}-seed-{seed}"
    if not (folder / "summary.txt").exists():
        print(f"running {folder.name}", file=sys.stderr)
        command = ["bash", f"{ROOT}/train_scripts/quickstart.sh", f"--seed={seed}", f"--out={out}"]
        command += [f"trainer.default_local_dir={folder}", f"trainer.max_policy_age={age}"]
        environment = os.environ | {"VERL_PYTHON": sys.executable}
        log = out / f"{folder.name}.log"
        out.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            options = {"env": environment, "stdout": file, "stderr": file}
            if subprocess.run([*command, *OWN * own], **options).returncode:
                raise RuntimeError(log.read_text()[-4000:])
    return read_metrics(folder / "metrics.jsonl")


def curve(records: Records) -> NDArray[np.float64]:
    """Step, seconds until then, and accuracy in per cent, at each validation, [V, 3]."""
    seconds, rows = 0.0, []
    for record in records:
        seconds += record.get("timing_s/step", 0.0)
        if ACCURACY in record:
            rows.append([record["step"], seconds, 100 * record[ACCURACY]])
    return np.array(rows)


def mean(runs: list[Records], metric: str) -> float:
    """Over the steps of all runs but the first two of each."""
    return float(np.mean([r[metric] for run in runs for r in run[3:] if metric in r] or [0.0]))


def show(age: int, runs: list[Records]) -> None:
    """Prints a line about the runs of an age."""
    average = np.array([curve(run) for run in runs]).mean(0)
    step_s = [mean([run], "timing_s/step") for run in runs]
    print(
        f"k = {age}: {spread(step_s)} a step; accuracy",
        *(f"{accuracy:.1f} %" for accuracy in average[:, 2]),
        f"after {', '.join(f'{t:.0f}' for t in average[:, 1])} s; mean age of a token",
        f"{mean(runs, 'rollout/policy_age_mean'):.2f}, several versions "
        f"{mean(runs, 'async/several_versions'):.0%}; the trainer waits "
        f"{mean(runs, 'timing_s/gen'):.2f} s, updates {mean(runs, 'timing_s/update_actor'):.2f} s;",
        f"response length {mean(runs, 'response_length/mean'):.1f}",
    )


def plot(file: Path, by_age: dict[int, list[Records]]) -> None:
    """Accuracy over steps, and over time: of each run thin, of their mean bold."""
    from matplotlib.figure import Figure

    from verl.tools.curves import PALETTE

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (age, runs), (color, _) in zip(by_age.items(), PALETTE, strict=False):
        curves = np.array([curve(run) for run in runs])
        for column, ax in enumerate(axes):
            for each in curves:
                ax.plot(each[:, column], each[:, 2], color=color, alpha=0.25, lw=0.8)
            average, label = curves.mean(0), f"max_policy_age={age}"
            ax.plot(average[:, column], average[:, 2], color=color, lw=2, marker="o", label=label)
    axes[0].set(xlabel="training steps", ylabel="accuracy, %")
    axes[1].set(xlabel="seconds of training")
    for ax in axes:
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs/policy_age", help="[%(default)s]"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--own", action="store_true", help="an engine with a device of its own")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    options = parser.parse_args()
    by_age: dict[int, list[Records]] = {age: [] for age in options.ages}
    for seed in options.seeds:
        for age in options.ages:
            by_age[age].append(train(options.out.absolute(), age, seed, options.own))
    for age, runs in by_age.items():
        show(age, runs)
    if options.plot:
        plot(options.plot, by_age)


if __name__ == "__main__":
    main()
