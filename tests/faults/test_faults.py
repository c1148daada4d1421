"""Faults one by one: what the run does, what it says, and that nothing is lost."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import assert_same, fault, job
from verl.trainer.ppo.checkpoint import LATEST, damage


@fault
def test_a_dead_actor_rank_ends_the_run(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with job(settings, folder) as running:
        running.until(lambda: (folder / LATEST).exists())
        assert running.kill("ray::PolicyWorker")
        log = running.end(1)
    assert "Traceback" not in log
    assert "a worker died, of class PolicyWorker" in log
    assert f"the same command goes on from {folder}/global_step_2\n" in log
    assert "ActorDiedError" in (folder / "error.log").read_text()
    assert damage(folder / "global_step_2") is None
    with job(settings, folder) as running:
        assert f"resuming from {folder}/global_step_2" in running.end()
    assert_same(folder, finished)


@fault
def test_ctrl_c_ends_the_run_after_the_step(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    """It comes for all processes of the group, as a terminal sends it, while responses are drawn:
    for step 2 or, on a busy machine, for a later one."""
    folder = tmp_path / "run"
    with job(settings, folder, warm=False) as running:
        running.until_step(1)
        assert running.until(lambda: running.find("HFEngine.generate_rows"), pause=0.02)
        os.killpg(running.process.pid, signal.SIGINT)
        log = running.end(130)
    assert "stopping after this step, with a checkpoint" in log
    assert (step := (folder / LATEST).read_text()) in ("2", "3", "4")
    assert f"stopped; the same command goes on from {folder}/global_step_{step}" in log
    assert "Traceback" not in log
    with job(settings, folder) as running:
        assert f"resuming from {folder}/global_step_{step}" in running.end()
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


@fault
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
