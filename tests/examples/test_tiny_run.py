"""examples/tiny_run.py from start to end, with a task of one's own, and what ends it midway."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, Processes
from verl.trainer.ppo.tracking import read_metrics
from verl.utils.signals import SIGNALS

QUICKSTART = ["bash", str(ROOT / "train_scripts" / "quickstart.sh")]
STEPS = 15
SIGHUP = pytest.param(
    signal.SIGHUP, marks=pytest.mark.skipif(signal.SIGHUP not in SIGNALS, reason="nohup")
)
stopped = pytest.mark.series(1, "a stopped tiny run")
OWN_TASK = f"""
import sys
from dataclasses import replace

sys.path.insert(0, {str(ROOT / "examples")!r})
import tiny_run

tiny_run.TASKS["mine"] = replace(
    tiny_run.COUNTDOWN,
    project="mine",
    data=(
        "data_preprocess/countdown.py --generate --template_type tiny --max_operands 3"
        " --max_number 10 --max_target 50 --train_size 64 --test_size 16",
        "tiny_countdown.py --sft_size 128 --hidden_size 32 --num_layers 1",
    ),
    rl="data.train_batch_size=8 actor_rollout_ref.actor.ppo_mini_batch_size=8"
    " data.max_prompt_length=16 data.max_response_length=64 trainer.test_freq=-1"
    " trainer.total_training_steps={STEPS}",
)
tiny_run.main(["mine", *sys.argv[1:]])
"""


class Program(subprocess.Popen[bytes]):
    """A program and all that it starts, in forks of `warm_python`. Unless `warm` they are ordinary
    processes, and Ray's are in the program's process group."""

    def __init__(self, command: list[str], log: Path, warm: bool) -> None:
        self.processes = Processes(warm)
        python, variables = self.processes.python, self.processes.variables
        with log.open("w") as file:
            super().__init__(
                [python if part == sys.executable else part for part in command],
                env=os.environ | {"VERL_PYTHON": python, "DRY_RUN": "0"} | variables,
                stdout=file,
                stderr=file,
                process_group=0,
            )


@contextmanager
def started(command: list[str], log: Path, warm: bool = True) -> Iterator[Program]:
    """A program that ends with the block; what it prints goes to `log`."""
    with Program(command, log, warm) as program:
        try:
            yield program
        finally:
            program.processes.kill()


def wait_until(process: Program, log: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def end(process: Program, number: int) -> int:
    """Sends the signal to this process alone, or as from its terminal to all that it has started;
    its status, once all of them are gone."""
    children = [child for child in process.processes.alive() if child.pid != process.pid]
    assert len(children) > 2, "Ray and its workers"
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    status = process.wait(120)
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
    return status


@stopped
@pytest.mark.parametrize("number", [signal.SIGTERM, SIGHUP])
def test_a_task_of_ones_own_stopped_by_a_signal_and_finished(tmp_path: Path, number: int) -> None:
    (program := tmp_path / "mine.py").write_text(OWN_TASK)
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(program), "--out", str(out)]

    def metrics() -> list[dict[str, float]]:
        return [line for file in out.glob("*/metrics.jsonl") for line in read_metrics(file)]

    with started(command, log, warm=number == signal.SIGTERM) as process:
        wait_until(process, log, lambda: len(metrics()) >= 2)
        assert end(process, number) == 128 + number
    assert "stopping after this step, with a checkpoint" in log.read_text()
    warmed, run = sorted(out.iterdir(), key=lambda path: not path.name.startswith("warm-up-"))
    reached = metrics()[-1]["step"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == str(reached)
    assert reached < STEPS and not (run / "summary.txt").exists()

    with started(command, log) as process:
        assert process.wait(300) == 0, log.read_text()
    printed = log.read_text()
    assert f"[1/3] The warmed-up model of an earlier run: {warmed}\n" in printed
    assert f"[3/3] RL with delta-l-norm, on from the last checkpoint in {run}\n" in printed
    assert [line["step"] for line in metrics()] == list(range(STEPS + 1))
    assert (run / "report.html").exists()

    with started(command, log) as process:
        assert process.wait(120) == 0
    first, _, shown = log.read_text().partition("\n")
    assert first.startswith("This run is finished")
    assert shown.strip() and shown in printed


@stopped
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_warm_up_leaves_nothing(tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [*QUICKSTART, "--out", str(out)]
    with started(command, log, warm=number == signal.SIGTERM) as process:
        wait_until(process, log, lambda: "loss" in log.read_text())
        warm = [part.pid for part in process.processes.alive()] if number == signal.SIGTERM else []
        (folder,) = out.iterdir()
        assert folder.name in [f".warm-up-{pid}" for pid in warm or [process.pid]]
        assert end(process, number) == 128 + number, log.read_text()
    assert "stopped; the warm-up starts anew" in log.read_text()
    assert not list(out.iterdir())


def test_fresh_deletes_no_folder_that_the_user_chose(tmp_path: Path) -> None:
    (kept := tmp_path / "kept").mkdir()
    command = [*QUICKSTART, "--fresh", f"trainer.default_local_dir={kept}", f"--out={tmp_path}/out"]
    with started(command, tmp_path / "log") as process:
        assert process.wait(120) == 2
    assert f"delete {kept}" in (tmp_path / "log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "log"]
