"""Methods by name, and a table and a report of what their runs have learned."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd

from examples.tiny_run import METHODS
from verl.config.schema import ADV_ESTIMATORS, LOSS_MODES, Config
from verl.tools.runs import Run, accuracy_columns, read_run
from verl.trainer.ppo.tracking import align

FIGURES = {"accuracy": "{:.1f}", "lead": "{:+.1f}", "last": "{:.1f}", "length": "{:.0f}"}


def arguments_of(words: str) -> tuple[str, ...]:
    """The quick start's arguments for a method in `words`. Raises: SystemExit for a wrong word."""
    found: list[str] = []
    for word in words.split():
        key, is_override, value = word.partition("=")
        if word in METHODS or (".py:" in word and not is_override):
            found += ["--method", word]
        elif key == "alpha" or word == "auto" or word.replace(".", "").isdecimal():
            found += ["--alpha", value or word]
        elif word in LOSS_MODES:
            found.append(f"actor_rollout_ref.actor.policy_loss.loss_mode={word}")
        elif word in ADV_ESTIMATORS:
            found.append(f"algorithm.adv_estimator={word}")
        elif is_override:
            keys = [k for k, _, _ in Config().walk() if f".{k}".endswith(f".{key}")]
            if len(keys) != 1:
                raise SystemExit(f"{words!r}: {key} is the end of {keys or 'no key'}")
            found.append(f"{keys[0]}={value}")
        else:
            names = ", ".join([*METHODS, *LOSS_MODES, *ADV_ESTIMATORS])
            raise SystemExit(f"{words!r}: {word} is no key=value, no alpha, and none of {names}")
    return tuple(found)


def figures(run: Run, base: Run) -> list[float]:
    """`FIGURES` of a run: the mean accuracy of the validations after training began, in per cent,
    how much more that is than in `base`, the last accuracy, and the mean length of the last step's
    responses, in tokens."""

    def accuracies(of: Run) -> pd.Series:
        (column,) = accuracy_columns(of.frame).values()
        values = 100 * of.series(column)
        return values[values.index > 0]

    mine = accuracies(run)
    lead = mine.mean() - accuracies(base).mean()
    return [mine.mean(), lead, mine.iloc[-1], run.series("response_length/mean").iloc[-1]]


def compare(out: Path, folders: Mapping[tuple[str, int], Path]) -> None:
    """Writes table.txt and report.html to `out`. Folders of runs by method and seed; leads are over
    the first method's run with the same seed."""
    runs, rows = {key: read_run(path) for key, path in folders.items()}, [["", *FIGURES]]
    first = next(iter(runs))[0]
    for method in dict.fromkeys(name for name, _ in runs):
        seeds = [seed for name, seed in runs if name == method]
        values = [figures(runs[method, seed], runs[first, seed]) for seed in seeds]
        cells = map(_spread, zip(*values, strict=True), FIGURES.values())
        rows.append([method, *cells])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(align(rows) + "\n")
    page = str(out / "report.html")
    command = [sys.executable, "-m", "verl.tools.report", *map(str, folders.values()), "-o", page]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{align(rows)}\n  {page}", flush=True)


def _spread(values: Iterable[float], form: str) -> str:
    numbers = [*values]
    spread = f" ± {stdev(numbers):.{form[-3]}f}" if len(numbers) > 1 else ""
    return form.format(fmean(numbers)) + spread
