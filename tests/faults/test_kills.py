"""Processes that are killed at random points; many by `pytest tests/faults --all --kills 20`.

A killed run is started again with the same command. When it has ended, its metrics are those of the
run that was left alone, line by line, and its parameters are the same bit for bit.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.faults.jobs import PATIENCE_S, Job, assert_same, fault, job, lines
from tests.helpers import free_address, server_python

KILLS_PER_RUN = 3
LONGEST_S = 3.0
"""Longest time from the end of a random step to a kill; about that of a step."""


def kill_driver(running: Job, rng: np.random.Generator) -> bool:
    running.kill_driver()
    return True


def kill_while_saving(running: Job, rng: np.random.Generator) -> bool:
    tmp = "global_step_*.tmp"
    if not running.until(lambda: list(running.folder.glob(tmp)), pause=0.001):
        return False
    time.sleep(rng.uniform(0, 0.15))
    return kill_driver(running, rng)


def kill_engine(running: Job, rng: np.random.Generator) -> bool:
    return running.kill("ray::HFEngine", rng.choice)


def kill_actor(running: Job, rng: np.random.Generator) -> bool:
    return running.kill("ray::PolicyWorker", rng.choice)


KILLS: dict[str, Callable[[Job, np.random.Generator], bool]] = {
    "the driver, while it saves": kill_while_saving,
    "an engine": kill_engine,
    "an actor rank": kill_actor,
    "the driver": kill_driver,
}


@fault
def test_random_kills_lose_nothing(
    settings: list[str], finished: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    kills, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("kill_seed")
    rng = np.random.default_rng(seed)
    print("seed", seed)
    left = [list(KILLS)[(seed + i) % len(KILLS)] for i in range(kills)]
    if kills > len(KILLS):
        rng.shuffle(left)
    expected, runs = lines(finished), 0
    while left or runs == 0:
        folder, done, runs = tmp_path / f"run{runs}", False, runs + 1
        mine, left = left[:KILLS_PER_RUN], left[KILLS_PER_RUN:]
        steps = sorted(rng.integers(-1, 4, len(mine)))
        while not done:
            with job(settings, folder, "trainer.max_restarts=9", "trainer.save_freq=1") as running:
                while mine and running.until_workers():
                    running.until_step(steps[-len(mine)])
                    time.sleep(rng.uniform(0, LONGEST_S))
                    if running.running:
                        found = [line["step"] for line in lines(folder)]
                        print(f"run {runs}: killing {mine[0]}; steps so far:", *found, flush=True)
                        if KILLS[mine[0]](running, rng):
                            del mine[0]
                        whole = lines(folder)[:-1]
                        assert whole == expected[: len(whole)]
                status = running.process.wait(PATIENCE_S)
                done = status == 0
                assert done or status == -signal.SIGKILL, running.log
                running.assert_nothing_is_left(but="agent")
        assert_same(folder, finished)
        left = mine + left  # the run was over before
    print(f"{kills} kills in {runs} runs")


def test_a_reward_server_that_is_killed_loses_nothing(
    math_settings: list[str],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """It is started again. tests/trainer/test_math_run.py kills one that the run didn't start."""
    kills = pytestconfig.getoption("kills") // 5
    if not kills or not server_python():
        pytest.skip("needs --kills 5 or more, and the LaTeX server's environment")
    rng = np.random.default_rng(pytestconfig.getoption("kill_seed"))
    url = f"http://{free_address().removeprefix('tcp://')}"
    server = "reward_model.math_server.autostart=True", f"reward_model.math_server.url={url}"
    for folder, number in ((tmp_path / "alone", 0), (tmp_path / "killed", kills)):
        with job(math_settings, folder, *server) as running:
            for _ in range(number):
                running.until_step(rng.integers(0, 6))
                time.sleep(rng.uniform(0, LONGEST_S))
                assert running.until(lambda: running.kill("-m server.math "))
            running.end()
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
