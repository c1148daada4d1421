"""`-m`: one run for each value, checked before the first starts, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT
from verl.config.load import ConfigError
from verl.tools.sweep import sweep
from verl.utils.signals import SIGNALS

ALPHA = "algorithm.grpopp_config.alpha"
SLEEPER = """
import os, sys, time
from verl.config.load import entry_point

def run(config):
    seconds = config.data.seed
    print(config.trainer.default_local_dir, os.getpid(), flush=True)
    if seconds == 5:
        sys.exit(3)
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    entry_point(run, "ppo_trainer")
"""


def start(
    module: str, *arguments: str, path: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    """`python -m`, in a process group of its own as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{path}"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@pytest.fixture
def sleeper(tmp_path: Path) -> Path:
    """The folder of a module `sleeper`, whose run sleeps for `data.seed` seconds, or fails at 5."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    return tmp_path


def test_every_combination_is_a_run_with_a_name_of_its_own() -> None:
    runs = sweep(
        ["algorithm.use_grpopp=True", f"{ALPHA}=0.5,1", "data.seed=range(1,3)"], "ppo_trainer"
    )
    assert list(runs) == [
        "gsm8k-alpha-0.5-seed-1",
        "gsm8k-alpha-0.5-seed-2",
        "gsm8k-alpha-1-seed-1",
        "gsm8k-alpha-1-seed-2",
    ]
    assert runs["gsm8k-alpha-1-seed-2"] == [
        "algorithm.use_grpopp=True",
        f"{ALPHA}=1",
        "data.seed=2",
        "trainer.experiment_name='gsm8k-alpha-1-seed-2'",
    ]


def test_lists_paths_and_names_can_be_swept() -> None:
    path, betas = "actor_rollout_ref.model.path", "actor_rollout_ref.actor.optim.betas"
    runs = sweep([f"{path}='a/b','c d'", f"{betas}=[0.9,0.95],[0.8,0.9]"])
    assert list(runs)[::3] == ["gsm8k-path-a_b-betas-0.9_0.95", "gsm8k-path-c_d-betas-0.8_0.9"]
    assert list(sweep(["trainer.experiment_name=x,y"])) == ["x", "y"]
    assert list(sweep(["trainer.experiment_name=x"])) == ["x"]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            [f"{ALPHA}=1,-1,-2", "data.sed=1"],
            [
                "there is no key 'data.sed'; the nearest one is 'data.seed'",
                f"{ALPHA}=-1.0: must be at least 0",
                f"{ALPHA}=-2.0: must be at least 0",
            ],
        ),
        (
            ["data.seed=1,2", "trainer.default_local_dir=x"],
            [
                "the run gsm8k-seed-2 would share the folder x with another: let "
                "trainer.default_local_dir end in ${trainer.experiment_name}"
            ],
        ),
        (["data.seed=interval(1,2)"], ["data.seed=interval(1,2): Can only enumerate CHOICE and "]),
        (["seed=1,2"], ["there is no key 'seed'; the nearest one is 'data.seed'"]),
    ],
)
def test_what_is_wrong_with_any_run_stops_the_sweep(overrides: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(overrides)
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    assert all(text.startswith(start) for text, start in zip(found, lines, strict=True))


def test_several_values_need_the_option() -> None:
    process = start("verl.trainer.main_ppo", f"{ALPHA}=0.5,1")
    assert process.communicate()[1] == (
        f"error: {ALPHA}=0.5,1: several values are several runs, and take -m\n"
    )
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("module", "option", "name"),
    [
        ("verl.trainer.main_ppo", "-m", "gsm8k"),
        ("recipe.dapo.main_dapo", "--multirun", "gsm8k"),
        ("verl.trainer.main_sft", "-m", "warm-up"),
    ],
)
def test_dry_run_prints_a_document_for_each(module: str, option: str, name: str) -> None:
    shuffle = "data.shuffle=False"
    process = start(module, "data.seed=1,2", option, shuffle, DRY_RUN="quiet")
    out, err = process.communicate()
    documents = list(yaml.safe_load_all(out))
    assert [d["data"]["seed"] for d in documents] == [1, 2]
    assert not any(d["data"]["shuffle"] for d in documents)
    names = [d["trainer"]["default_local_dir"].split("/")[-1] for d in documents]
    assert names == [f"{name}-seed-1", f"{name}-seed-2"]
    assert process.returncode == 0 and f"[2/2] {name}-seed-2\n" in err


def test_a_run_that_fails_does_not_stop_the_others(sleeper: Path) -> None:
    process = start("sleeper", "-m", "data.seed=5,0", path=sleeper)
    out, err = process.communicate()
    (first, one), (second, two) = map(str.split, out.splitlines())
    assert first.endswith("/gsm8k-seed-5") and second.endswith("/gsm8k-seed-0") and one != two
    assert process.returncode == 1
    assert err.splitlines()[-3:] == [
        "2 runs:",
        "  status 3     gsm8k-seed-5",
        "  status 0     gsm8k-seed-0",
    ]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_and_the_sweep(sleeper: Path, number: int) -> None:
    """A terminal's reach all its processes; a job manager tells the first alone."""
    process = start("sleeper", "-m", "data.seed=600,601", path=sleeper)
    assert process.stdout and process.stdout.readline().split()[0].endswith("/gsm8k-seed-600")
    began = time.monotonic()
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    out, err = process.communicate()
    assert time.monotonic() - began < 60 and out == ""
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == "  not started  gsm8k-seed-601"
