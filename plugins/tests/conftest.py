"""The trainers' environments, and what tests share. plugins/test.sh runs them, in our own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PLUGINS = Path(__file__).parents[1]
ROOT = PLUGINS.parent
sys.path[:0] = [str(PLUGINS), str(ROOT)]

from tests.helpers import VOCABULARY, free_address, make_tiny_model, make_tokenizer  # noqa: E402

ENVIRONMENTS = Path(os.environ.get("PLUGIN_ENVS", ROOT / ".venv-plugins"))


def run_in(environment: str, arguments: Sequence[Any], log: Path) -> None:
    """Runs the interpreter of a trainer's environment, where our `verl` can't be imported. The test
    is skipped where the environment isn't there."""
    command = [ENVIRONMENTS / environment / "bin/python", *arguments]
    if not command[0].exists():
        pytest.skip(f"{command[0]} isn't there: bash plugins/test.sh makes it")
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    variables.pop("PYTHONPATH", None)
    with log.open("w") as output:
        done = subprocess.run(
            list(map(str, command)), env=variables, cwd=log.parent, stdout=output, stderr=output
        )
    assert not done.returncode, log.read_text()[-6000:]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with 20 tokens: one in twenty ends a completion, so that lengths differ."""
    folder = make_tiny_model(
        tmp_path_factory.mktemp("model"), "Qwen2", vocab_size=20, head_dim=None
    )
    make_tokenizer(VOCABULARY[:20]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> None:
    """The process group of a single rank, which our policy needs."""
    import torch.distributed as dist

    dist.init_process_group("gloo", free_address(), world_size=1, rank=0)
