"""The first run on GPUs, in rungs that each add one thing: `python -m verl.tools.first_run`.

Each rung is a real job of `verl.trainer.main_ppo` in a folder of its own, with a time limit, and
what it reports is checked. The first rung that fails ends it, and its files are collected for a bug
report. `train_scripts/first_run.sh` calls it; `--cpu` does on a CPU what can be done there.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.tools import machine
from verl.tools.rung_checks import Findings, judge, judge_preflight, judge_resumed
from verl.tools.rungs import REPO, SCRIPT, TABLE, FirstRun, Job, Rung, RungFailed
from verl.trainer.ppo.tracking import align, read_metrics

PATIENCE = 20.0
"""Seconds that a job has to end by itself when it is asked to."""


@dataclass(slots=True)
class Passed:
    """What is kept of a rung that has passed, in passed.json of its folder."""

    commands: list[list[str]]
    findings: Findings = field(default_factory=Findings)

    def save(self, folder: Path) -> None:
        """Writes it."""
        (folder / "passed.json").write_text(json.dumps(asdict(self), indent=1))


def read_passed(folder: Path, commands: list[list[str]]) -> Passed | None:
    """What a rung has left that passed with the same commands."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((folder / "passed.json").read_text())
        if content["commands"] == commands:
            return Passed(commands, Findings(**content["findings"]))
    return None


def run_rung(first: FirstRun, rung: Rung, show: Callable[[str], None]) -> Findings:
    """Runs a rung's jobs and checks them. Raises: RungFailed."""
    folder, commands = first.folder(rung), first.commands(rung)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started, findings, limit = time.monotonic(), Findings(), 60 * rung.minutes
    for job, command in zip(rung.jobs, commands, strict=True):
        before, log = records(folder), folder / "log.txt"

        def watch(job: Job = job) -> None:
            step = max((line["step"] for line in records(folder)), default=0)
            show(f"step {step} of {job.last} made" if step else "starts")

        problem = job_problem(run_job(command, log, first.environment(), limit, watch), limit, log)
        if rung.name == "preflight":
            findings = judge_preflight(folder / "preflight.json")
        elif (config := folder / "config.yaml").exists():
            last = None if problem else job.last
            findings = judge(records(folder), config, last, first.cpu)
            findings.problems += [] if problem else judge_resumed(before, records(folder))
        elif not problem:
            problem = "the job ended without an error, but has written no config.yaml"
        if problem or findings.problems:
            raise RungFailed(*([problem] if problem else []), *findings.problems)
    findings.seconds = round(time.monotonic() - started)
    for leftover in [*folder.glob("global_step_*"), folder / "huggingface"]:
        shutil.rmtree(leftover, ignore_errors=True)  # 43 GB of a model of 3B
    Passed(commands, findings).save(folder)
    return findings


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run has made so far."""
    with suppress(OSError, ValueError):
        return read_metrics(folder / "metrics.jsonl")
    return []


def run_job(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    limit: float,
    watch: Callable[[], None] = lambda: None,
) -> int | None:
    """Runs a command, whose output is appended to `log`, and calls `watch` about twice a second.
    Returns the exit status; None: it was ended, with all that it has started, after `limit` s."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)
            watch()
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def job_problem(status: int | None, limit: float, log: Path) -> str:
    """Why a job failed, with its error or the last line of its log; nothing if it didn't."""
    if status == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("stopped")]  # by us
    errors = [line for line in lines if line.startswith("error:")]
    what = f"the job ended with status {status}"
    if status is None:
        what = f"the job was not done after {limit / 60:.3g} minutes"
    return f"{what}: {([*lines, *errors] or ['no output'])[-1]}"


def collect(first: FirstRun, rung: Rung, problems: Sequence[str]) -> Path:
    """An archive to attach to a bug report: what failed, what was found before, and the files of
    the rung, without secrets."""
    report = first.out / "report"
    shutil.rmtree(report, ignore_errors=True)
    report.mkdir()
    number = first.table.index(rung)
    lines = [f"rung {number} ({first.about(rung)}) failed", *problems, "", "commands:"]
    (report / "report.txt").write_text(
        "\n".join([*lines, *map(shlex.join, first.commands(rung)), "", *table(first)]) + "\n"
    )
    files = [*first.out.glob("rung-*/preflight.json"), *first.out.glob("rung-*/passed.json")]
    names = ("log.txt", "config.yaml", "metrics.jsonl", "error.log")
    for file in [*files, *(first.folder(rung) / name for name in names)]:
        if file.is_file():
            target = report / file.relative_to(first.out)
            target.parent.mkdir(exist_ok=True)
            text = file.read_text(errors="replace")
            target.write_text(machine.without_secrets(text[-5_000_000:]))
    with tarfile.open(first.out / "report.tar.gz", "w:gz") as archive:
        archive.add(report, "first-run-report")
    return first.out / "report.tar.gz"


def table(first: FirstRun) -> list[str]:
    """The figures of all rungs that have passed, with a head."""
    rows = [["rung", "seconds", "s a step", "tokens/s", "difference", "memory", "MFU"]]
    for number, rung in enumerate(first.table):
        if found := read_passed(first.folder(rung), first.commands(rung)):
            rows.append([f"{number}  {first.about(rung)}", *found.findings.cells()])
    return align(rows).splitlines()


def climb(first: FirstRun, start: int | None = None) -> int:
    """All rungs from `start` on, which is run again even if it has passed. Returns the status."""
    where = "the CPU" if first.cpu else f"{first.devices} GPU(s)"
    print(f"First run on {where}; files and logs: {first.out}")
    shutil.rmtree(first.out / "report", ignore_errors=True)  # of an earlier failure
    (first.out / "report.tar.gz").unlink(missing_ok=True)
    for number, rung in enumerate(first.table):
        head = f"rung {number}  {first.about(rung):<42}"
        if number < (start or 0):
            continue
        if first.cpu and rung.on_cpu is None:
            print(f"{head}  left out: it needs a GPU")
            continue
        done = read_passed(first.folder(rung), first.commands(rung))
        if done and number != start:
            print(f"{head}  has passed before: {done.findings}")
            continue
        progress = Progress(head)
        try:
            if number:
                first.prepare()
            findings = run_rung(first, rung, progress.show)
        except RungFailed as failure:
            problems = [line for text in failure.args for line in text.splitlines()]
            progress.end("FAILED", [f"  {line}" for line in problems])
            archive = collect(first, rung, problems)
            print(f"\nPlease report rung {number} with the lines above, and attach {archive}")
            print("(preflight.json, and the rung's log.txt, config.yaml and metrics.jsonl)")
            return 1
        warnings = [f"  warning: {text}" for text in findings.warnings]
        progress.end(f"passed in {findings.seconds} s: {findings}", warnings)
    print("", *table(first), "", sep="\n")
    (first.out / "summary.txt").write_text("\n".join(table(first)) + "\n")
    if first.cpu:
        print("Nothing has failed here. On a machine with GPUs: bash train_scripts/first_run.sh")
    else:
        print(f"Nothing has failed. Start a run: bash {SCRIPT.relative_to(REPO)}")
    return 0


class Progress:
    """One line about a rung: rewritten in a terminal, else a new one for each change."""

    def __init__(self, head: str) -> None:
        self.head, self.last, self.started = head, "", time.monotonic()
        self.terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """What it does now."""
        if self.terminal:
            seconds = time.monotonic() - self.started
            print(f"\r\033[K{self.head}  {text} ({seconds:.0f} s)", end="", flush=True)
        elif text != self.last:
            print(f"{self.head}  {text}", flush=True)
        self.last = text

    def end(self, text: str, lines: Sequence[str] = ()) -> None:
        """How it ended."""
        print(f"{chr(13) + chr(27) + '[K' if self.terminal else ''}{self.head}  {text}")
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)


def read_arguments(arguments: Sequence[str]) -> tuple[FirstRun, int | None]:
    """Ends the process for what can't be."""
    parser = argparse.ArgumentParser(prog="first_run.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with a tiny model only")
    parser.add_argument("--fresh", action="store_true", help="also what has passed before")
    parser.add_argument("--rung", type=int, choices=range(len(TABLE)), help="start with this one")
    parser.add_argument("--out", type=Path, help="for all files [outputs/first-run, …-cpu]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all rungs")
    options = parser.parse_intermixed_args(arguments)
    if wrong := [text for text in options.overrides if "=" not in text]:
        parser.error(f"{wrong[0]} is neither an option nor an override (key=value)")
    dry = os.environ.get("DRY_RUN", "0") not in ("", "0")
    if not (dry or find_spec("vllm")):
        kind = "cpu --vllm" if options.cpu else "gpu"
        parser.error(f"{sys.executable} has no vLLM: run bash setup.sh {kind} first")
    gpus = len(machine.read_gpus())
    if not (dry or options.cpu or machine.driver_version()):
        parser.error("this machine has no NVIDIA driver; --cpu tries what can be tried without")
    devices = int(os.environ.get("N_GPUS") or (2 if options.cpu else min(4, gpus) or 1))
    default = Path("outputs") / ("first-run-cpu" if options.cpu else "first-run")
    first = FirstRun((options.out or default).expanduser().absolute(), options.cpu, devices)
    first.overrides = tuple(options.overrides)
    if options.fresh and not dry:
        for rung in TABLE:
            shutil.rmtree(first.folder(rung), ignore_errors=True)
    return first, options.rung


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a rung failed, 2 for overrides that can't be."""
    first, start = read_arguments(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("DRY_RUN", "0") not in ("", "0"):
        for rung in first.table:
            print(f"# {first.about(rung)}", *map(shlex.join, first.commands(rung)), sep="\n")
        return 0
    # What is wrong in an override is nothing to report.
    environment = first.environment() | {"DRY_RUN": "quiet"}
    command = first.commands(first.table[1])[0]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True)
    if tried.returncode:
        print(tried.stderr, end="", file=sys.stderr)
        return tried.returncode
    first.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return climb(first, start)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with this rung", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
