"""A run for each combination of values: what `-m` of the entry points starts.

`python -m verl.tools.sweep MODULE CONFIG_NAME CONFIG_DIR key=a,b …`
"""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from verl.config.load import HERE, ConfigError, compose_config, exit_with, parse_override
from verl.utils.signals import SIGNALS


def sweep(
    overrides: Sequence[str], config_name: str = "ppo_trainer", config_dir: str | Path = HERE
) -> dict[str, list[str]]:
    """The runs of `-m`: name, which ends in what sets the run apart, → overrides.

    Raises: ConfigError for whatever is wrong with any of them, or if two would share a folder.
    """
    choices: list[list[tuple[str, str]]] = []  # of each override: what it says in a run, its label
    for override in map(parse_override, overrides):
        key, leaf = override.get_key_element(), override.key_or_group.rpartition(".")[2]
        if override.is_sweep_override():
            try:
                values = list(override.sweep_string_iterator())
            except HydraException as error:
                raise ConfigError(f"{override.input_line}: {error}") from None
            leaf = "" if leaf == "experiment_name" else f"-{leaf}-"
            labels = [leaf and leaf + re.sub(r"[^\w.+-]+", "_", v.strip("'[]")) for v in values]
            choices.append([(f"{key}={v}", x) for v, x in zip(values, labels, strict=True)])
        else:
            choices.append([(override.input_line or "", "")])
    runs: dict[str, list[str]] = {}
    folders: set[str] = set()
    problems: list[str] = []
    for chosen in itertools.product(*choices):
        given = [text for text, _ in chosen]
        try:
            trainer = compose_config(given, config_name, config_dir).trainer
            name = trainer.experiment_name + "".join(label for _, label in chosen)
            given.append(f"trainer.experiment_name='{name}'")
            trainer.experiment_name = parse_override(given[-1]).value()  # as its run will read it
            folder = trainer.default_local_dir
        except ConfigError as error:
            problems += str(error).splitlines()
            continue
        if name in runs or folder in folders:
            problems.append(
                f"the run {name} would share the folder {folder} with another: let "
                "trainer.default_local_dir end in ${trainer.experiment_name}"
            )
        runs[name] = given
        folders.add(folder)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return runs


def run_all(
    module: str, runs: dict[str, list[str]], config_name: str, config_dir: str | Path
) -> int:
    """One after another, each in a process of its own; returns the exit status."""
    program = [sys.executable, *([module] if module.endswith(".py") else ["-m", module])]
    program += ["--config-name", config_name, "--config-path", str(config_dir)]
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        if process and number == signal.SIGTERM:  # the others come from a terminal, to the run, too
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    lines, failed = [], False
    for i, (name, overrides) in enumerate(runs.items(), 1):
        if stopped:
            lines.append(f"  not started  {name}")
            continue
        print(f"[{i}/{len(runs)}] {name}", file=sys.stderr)
        if os.environ.get("DRY_RUN", "0") not in ("", "0"):
            print("---", flush=True)
        process = subprocess.Popen([*program, *overrides])
        failed |= process.wait() != 0
        lines.append(f"  status {process.returncode:<4}  {name}")
    print(f"{len(runs)} runs:", *lines, sep="\n", file=sys.stderr)
    return 128 + stopped[0] if stopped else int(failed)


def main(module: str, config_name: str, config_dir: str, *overrides: str) -> None:
    """Checks all runs, then starts them; ends with status 2 if one of them can't be."""
    try:
        runs = sweep(overrides, config_name, config_dir)
    except ConfigError as error:
        exit_with(2, f"error: {error}".replace("\n", "\nerror: "))
    raise SystemExit(run_all(module, runs, config_name, config_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
