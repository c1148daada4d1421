"""What the tests share: a tiny real model with its tokenizer, and random samples; their order."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # the others need the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT, make_tiny_model
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


def pytest_configure() -> None:
    """Starts the server of `warm_python.py`, one for all workers of pytest-xdist; it ends with the
    process that has the other end of its standard input."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="warm-")
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm_python", folder],
            cwd=ROOT,
            env=os.environ | WORKER_ENV | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ["WARM_PYTHON"] = f"{folder}/python"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/faults."""
    parser.addoption("--kills", type=int, default=1, help="processes to kill at random points")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of these points")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by file alone; within each, and among the others, the order stays."""
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
