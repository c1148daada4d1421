"""Methods by name, and a table and a report of what their runs have learned."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev

from examples.tiny_run import METHODS
from verl.config.schema import ADV_ESTIMATORS, LOSS_MODES, Config
from verl.tools.runs import Run, accuracy_columns, read_run
from verl.trainer.ppo.tracking import align

FIGURES = {
    "accuracy, mean": "{:.1f}",
    "accuracy at the end": "{:.1f}",
    "length at the end": "{:.0f}",
}


def arguments_of(words: str) -> tuple[str, ...]:
    """The quick start's arguments for a method in `words`. Raises: SystemExit for a wrong word."""
    found: list[str] = []
    for word in words.split():
        key, is_override, value = word.partition("=")
        if word in METHODS or (".py:" in word and not is_override):
            found += ["--method", word]
        elif word.replace(".", "").isdecimal():
            found += ["--alpha", word]
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


def figures(run: Run) -> list[float]:
    """`FIGURES` of a run: validation accuracies in per cent, the mean without that before training,
    and the mean length of the last step's responses, in tokens."""
    (column,) = accuracy_columns(run.frame).values()
    accuracies = 100 * run.series(column)
    trained = accuracies[accuracies.index > 0]
    return [trained.mean(), trained.iloc[-1], run.series("response_length/mean").iloc[-1]]


def compare(out: Path, folders: Mapping[tuple[str, int], Path]) -> None:
    """Writes table.txt and report.html to `out`. Folders of runs by method and seed."""
    rows = [["", "seeds", *FIGURES]]
    for method in dict.fromkeys(name for name, _ in folders):
        values = [figures(read_run(path)) for (name, _), path in folders.items() if name == method]
        cells = map(_spread, zip(*values, strict=True), FIGURES.values())
        rows.append([method, str(len(values)), *cells])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(align(rows) + "\n")
    command = [sys.executable, "-m", "verl.tools.report", *map(str, folders.values())]
    subprocess.run(
        [*command, "-o", str(out / "report.html")], check=True, stdout=subprocess.DEVNULL
    )
    print(f"{align(rows)}\n  {out / 'report.html'}", flush=True)


def _spread(values: Iterable[float], form: str) -> str:
    numbers = [*values]
    spread = f" ± {form.format(stdev(numbers))}" if len(numbers) > 1 else ""
    return form.format(fmean(numbers)) + spread
