"""The main job with the math reward: what a LaTeX server that dies costs a run."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import LatexServer, server_python, warm_children, warm_python, whole_run
from tests.trainer.test_main_ppo import command, read, run

pytestmark = pytest.mark.skipif(
    not server_python(), reason="needs the LaTeX server's environment: bash setup.sh --server-only"
)


@pytest.fixture(scope="module")
def server() -> Iterator[LatexServer]:
    server = LatexServer()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Responses are one word, so that a random model is right now and then; strings never match."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "data_source": "open_reasoner_zero",
            "prompt": f"{i} + {i}",
            "reward_model": {"style": "rule", "ground_truth": rf"\frac{{{4 * i}}}{{2}}"},
            "extra_info": {"index": i},
        }
        for i in range(1, 25)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:16]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[16:]), folder / "test.parquet")
    return [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        "data.apply_chat_template=False",
        "data.train_batch_size=16",
        "data.max_prompt_length=8",
        "data.max_response_length=1",
        f"actor_rollout_ref.model.path={tiny_model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=256",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.rollout.n=64",
        "actor_rollout_ref.rollout.val_kwargs.n=64",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1",
        "algorithm.use_grpopp=True",
        "trainer.logger=console",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=8",
        "trainer.test_freq=2",
        "trainer.save_hf_model=False",
    ]


def rewarded(settings: list[str], server: LatexServer, folder: Path) -> list[str]:
    return [
        *settings,
        f"reward_model.math_server.url={server.url}",
        f"trainer.default_local_dir={folder}",
    ]


@pytest.fixture(scope="module")
def reference(settings, server, tmp_path_factory) -> list[dict[str, float]]:
    """The steps of a run whose server lived."""
    folder = tmp_path_factory.mktemp("reference")
    run(rewarded(settings, server, folder))
    steps = read(folder)
    assert steps[-1]["critic/score/mean"] > 2 * steps[1]["critic/score/mean"] > 0
    assert all(step["reward/undecided"] == 0 for step in steps[1:])
    return steps


def kill_after_step(server: LatexServer, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(read(folder)) <= step:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.kill()


@whole_run
def test_a_server_that_is_away_costs_no_step(settings, server, reference, tmp_path):
    """The first time it comes back, and the run goes on; the second time it stays away, and the
    run ends."""
    overrides = [*rewarded(settings, server, tmp_path), "reward_model.math_server.max_wait_s=15"]
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    alone, environment = [warm_python(), *command(overrides)[1:]], os.environ | warm_children()
    with subprocess.Popen(alone, env=environment, stderr=subprocess.PIPE, text=True) as job:
        kill_after_step(server, tmp_path, 1)
        time.sleep(3)
        before = len(read(tmp_path))
        time.sleep(2)
        assert len(read(tmp_path)) == before < len(reference)  # it waits
        server.start()
        kill_after_step(server, tmp_path, before)
        _, log = job.communicate(timeout=300)
    assert job.returncode == 1, log
    assert "Traceback" not in log
    assert "waiting for the LaTeX server" in log
    assert "no answer from the LaTeX server" in log
    assert before <= int(latest.read_text()) == read(tmp_path)[-1]["step"] < 8
    server.start()
    run(overrides)
    assert read(tmp_path) == reference


def test_without_a_server_the_run_does_not_start(settings, server, tmp_path):
    server.kill()
    overrides = rewarded(settings, server, tmp_path)
    alone = [warm_python(), *command(overrides)[1:]]
    done = subprocess.run(alone, capture_output=True, text=True)
    server.start()
    assert done.returncode == 2
    assert "bash server/math/start.sh" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
