"""What the tests share: a tiny real model with its tokenizer, and random samples; their order."""

import multiprocessing
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Other tests need the cores, and a sum is rounded alike in every run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT, make_tiny_model, warm_python
from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.policy_losses import POLICY_LOSSES
from verl.algorithms.weights import WEIGHTS
from verl.cluster import WORKER_ENV

# The files that take longest, for the workers of pytest-xdist to start with: a long one that comes
# last would keep one busy and the others idle.
LONGEST = [
    "examples/test_tiny_run.py",
    "trainer/test_main_ppo.py",
    "rollout/test_pool.py",
    "trainer/test_main_vllm.py",
    "faults/test_faults.py",
    "trainer/test_dapo.py",
    "trainer/test_math_run.py",
    "faults/test_kills.py",
    "trainer/test_multi_node.py",
    "faults/test_bad_input.py",
    "test_docs.py",
    "trainer/test_options.py",
    "tools/test_preflight.py",
    "scripts/test_setup.py",
    "scripts/test_submit.py",
    "test_worker_group.py",
    "test_placement.py",
    "trainer/test_main_sft.py",
    "models/test_policy.py",
    "rewards/test_math_server.py",
    "scripts/test_dapo_scripts.py",
    "utils/test_hub.py",
    "tools/test_memory_plan.py",
    "tools/test_memory_emulated.py",
    "test_gpu_placement.py",
    "gpu/test_bare.py",
    "rollout/test_hf.py",
    "scripts/test_scripts.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """Starts the server of `warm_python.py`, one for all workers of pytest-xdist; it ends with the
    process that has the other end of its standard input. Its workers have the same seeds."""
    if given := config.option.sample_seed:
        os.environ["SAMPLE_SEED"] = given
    seed = os.environ.setdefault("SAMPLE_SEED", date.today().isoformat())
    config.option.sample_seed = seed
    if config.option.kill_seed is None:
        config.option.kill_seed = random.Random(config.option.sample_seed).randrange(1000)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="warm-")
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm_python", folder],
            cwd=ROOT,
            env=os.environ | WORKER_ENV | {"PYTHONWARNINGS": ""},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ["WARM_PYTHON"] = f"{folder}/python"
        warm = f"popen//python={warm_python()}"
        tx = config.getoption("tx", None) or []  # of pytest-xdist, for each of its workers
        config.option.tx = [warm if worker == "popen" else worker for worker in tx]
    multiprocessing.set_executable(warm_python())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of series, and of tests/faults."""
    parser.addoption("--all", action="store_true", help="all members of series, not a sample")
    parser.addoption("--sample-seed", help="what chooses the sample of series; default: the date")
    parser.addoption("--kills", type=int, default=1, help="processes to kill at random points")
    parser.addoption("--kill-seed", type=int, help="seed of these points; default: the day's")


def pytest_report_header(config: pytest.Config) -> str:
    """What repeats this run."""
    if config.getoption("all"):
        return "series: all members"
    return f"series: a sample of members, as with --sample-seed {config.option.sample_seed}"


def left_out(items: Sequence[pytest.Item], seed: str) -> list[pytest.Item]:
    """Members of series that don't run."""
    series: dict[str, list[pytest.Item]] = {}
    counts: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("series")
        if marker and not item.get_closest_marker("always"):
            name = item.nodeid.partition("[")[0] if len(marker.args) == 1 else marker.args[1]
            assert counts.setdefault(name, marker.args[0]) == marker.args[0], name
            series.setdefault(name, []).append(item)
    found: list[pytest.Item] = []
    for name, members in series.items():
        number = max(0, len(members) - counts[name])
        found += random.Random(f"{seed} {name}").sample(members, number)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what isn't in the sample, and sorts by file alone; within each, and among the
    others, the order stays."""
    if not config.getoption("all"):
        others = {*left_out(items, config.option.sample_seed)}
        config.hook.pytest_deselected(items=[item for item in items if item in others])
        items[:] = [item for item in items if item not in others]
    places = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def _own_functions_end() -> Iterator[None]:
    """Functions of the user's that a test makes known are unknown to the next one."""
    tables: Any = ADVANTAGES, POLICY_LOSSES, WEIGHTS
    built_in = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, built_in, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with tied embeddings and its word-level tokenizer, in Hugging Face format."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
