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

from tests.helpers import ROOT, warm_children, warm_python
from verl.trainer.ppo.tracking import read_metrics
from verl.utils.signals import SIGNALS

QUICKSTART = ["bash", str(ROOT / "train_scripts" / "quickstart.sh")]
STEPS = 15
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


@contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block; what it prints goes to `log`."""
    environment = os.environ | {"VERL_PYTHON": sys.executable, "DRY_RUN": "0"} | variables
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, process_group=0
        ) as process,
    ):
        children = []
        try:
            yield process
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
            for left in [process, *children]:
                left.kill()


def wait_until(
    process: subprocess.Popen[bytes], log: Path, condition: Callable[[], object]
) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes], number: int) -> int:
    """Sends the signal to this process alone, or as from its terminal to all that it has started;
    its status, once all of them are gone."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 2, "Ray and its workers"
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    status = process.wait(120)
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
    return status


def test_a_task_of_ones_own_stopped_by_signals_and_finished(tmp_path: Path) -> None:
    (program := tmp_path / "mine.py").write_text(OWN_TASK)
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(program), "--out", str(out)]

    def metrics() -> list[dict[str, float]]:
        return [line for file in out.glob("*/metrics.jsonl") for line in read_metrics(file)]

    for steps, number in ((2, signal.SIGTERM), (6, SIGNALS[-1])):
        with started(command, log) as process:
            wait_until(process, log, lambda steps=steps: len(metrics()) >= steps)
            assert end(process, number) == 128 + number
        assert "stopping after this step, with a checkpoint" in log.read_text()
        warm, run = sorted(out.iterdir(), key=lambda path: not path.name.startswith("warm-up-"))
        reached = metrics()[-1]["step"]
        assert (run / "latest_checkpointed_iteration.txt").read_text() == str(reached)
        assert reached < STEPS and not (run / "summary.txt").exists()

    command[0] = warm_python()  # no signals from here on
    with started(command, log, **warm_children()) as process:
        assert process.wait(300) == 0, log.read_text()
    printed = log.read_text()
    assert f"[1/3] The warmed-up model of an earlier run: {warm}\n" in printed
    assert f"[3/3] RL with delta-l-norm, on from the last checkpoint in {run}\n" in printed
    assert [line["step"] for line in metrics()] == list(range(STEPS + 1))
    assert (run / "report.html").exists()

    with started(command, log, **warm_children()) as process:
        assert process.wait(120) == 0
    first, _, shown = log.read_text().partition("\n")
    assert first.startswith("This run is finished")
    assert shown.strip() and shown in printed


@pytest.mark.series(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_warm_up_leaves_nothing(tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with started([*QUICKSTART, "--out", str(out)], log) as process:
        wait_until(process, log, lambda: "loss" in log.read_text())
        assert [path.name for path in out.iterdir()] == [f".warm-up-{process.pid}"]
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
