"""Faults one by one: what the run does, what it says, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import Job, assert_same, job
from verl.utils.checkpoint import LATEST, damage


def stop(
    settings: list[str], folder: Path, saved: int, status: int, send: Callable[[Job], None]
) -> None:
    """Resumes from step `saved`, and sends a signal while the responses of the next are drawn."""
    assert damage(folder / f"global_step_{saved}") is None
    with job(settings, folder) as running:
        assert running.until(lambda: running.find("HFEngine.generate"), pause=0.005)
        send(running)
        log = running.end(status)
    assert f"resuming from {folder}/global_step_{saved}" in log
    assert "stopping after this step, with a checkpoint" in log
    assert f"stopped after step {saved + 1}; the same command goes on" in log
    assert "Traceback" not in log
    assert (folder / LATEST).read_text() == str(saved + 1)


def test_a_dead_actor_rank_ends_the_run_and_a_stopped_one_goes_on(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    """First an actor rank is killed, then the run is stopped twice, by SIGTERM and by Ctrl-C for
    the whole process group, as a terminal sends it."""
    folder = tmp_path / "run"
    with job(settings, folder) as running:
        running.until_step(2)
        running.until(lambda: (folder / LATEST).exists())
        running.kill("ray::ActorWorker")
        log = running.end(1)
        assert "Traceback" not in log
        assert "a worker died, of class ActorWorker" in log
        assert "the same command goes on from the latest checkpoint" in log
        assert "ActorDiedError" in (folder / "error.log").read_text()
    stop(settings, folder, 2, 143, lambda running: running.process.terminate())
    stop(settings, folder, 3, 130, lambda r: os.killpg(r.process.pid, signal.SIGINT))
    with job(settings, folder) as running:
        running.end()
    assert_same(folder, finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_nothing_but_the_save(
    settings: list[str], finished: Path, small_disk: Path
) -> None:
    folder = small_disk / "run"
    ballast = small_disk / "ballast"
    with job(
        settings, folder, "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1"
    ) as running:
        running.until_step(1)
        running.until(lambda: (folder / LATEST).exists())
        with pytest.raises(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
        assert running.until(lambda: "NO CHECKPOINT OF STEP" in running.log)
        ballast.unlink()
        log = running.end()
    assert "No space left on device" in log
    assert "Traceback" not in log
    assert (folder / LATEST).read_text() == "4"
    assert damage(folder / "global_step_4") is None
    assert_same(folder, finished)
