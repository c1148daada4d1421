"""Runs whose generation has no end, end to end: real Ray, both placements, and a resumed run."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import whole_run
from tests.trainer.test_main_ppo import read, run, settings
from verl.config.load import load_config
from verl.data.dataset import PromptOrder

__all__ = ["settings"]  # a fixture


def trained(folder: Path, step: int) -> list[tuple[str, int, int]]:
    """Prompt, group and number of each response of a step."""
    table = pq.read_table(folder / "rollout" / f"{step}.parquet")
    columns = (table[name].to_pylist() for name in ("prompt", "group", "response_index"))
    return list(zip(*columns, strict=True))


def order(settings: list[str], batches: int) -> list[list[int]]:
    config = load_config(settings)
    drawn = PromptOrder(32, 16, config.data.seed, config.data.shuffle)
    return [drawn.next_batch() for _ in range(batches)]


def texts(settings: list[str]) -> list[str]:
    files = next(s.partition("=")[2] for s in settings if s.startswith("data.train_files"))
    return pq.read_table(files)["prompt"].to_pylist()


def check_step(folder: Path, step: int, expected: list[str]) -> None:
    """All eight responses to each of these prompts, in this order."""
    rows = trained(folder, step)
    assert rows == [(text, i, k) for i, text in enumerate(expected) for k in range(8)]


@whole_run
@pytest.mark.parametrize(
    "placement",
    [
        ("trainer.max_policy_age=1",),
        (
            "trainer.max_policy_age=2",
            "trainer.n_gpus_per_node=1",
            "trainer.rollout_gpus_per_node=1",
            "algorithm.rollout_correction.decoupled=True",
            "algorithm.rollout_correction.rollout_is=token",
            "actor_rollout_ref.rollout.verify_weights=True",
        ),
    ],
    ids=["shared", "own"],
)
def test_every_response_is_trained_on_once_in_the_order_of_prompts(
    settings: list[str], tmp_path: Path, placement: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    keys = [
        *placement,
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/rollout",
        "trainer.save_hf_model=False",
    ]
    run(settings, *keys)
    prompts, batches = texts(settings), order(settings, 4)
    for step, batch in enumerate(batches, 1):
        check_step(folder, step, [prompts[i] for i in batch])
    records = read(folder)
    age = int(placement[0][-1])
    assert [r["step"] for r in records if "training/global_step" in r] == [1, 2, 3, 4]
    ages = [r["rollout/policy_age_max"] for r in records if "rollout/policy_age_max" in r]
    assert ages[0] == 0 and max(ages) <= age and max(ages) > 0
    for name in ("async/engine_idle_share", "async/trainer_idle_share", "async/several_versions"):
        shares = [r[name] for r in records if name in r]
        assert len(shares) == 4 and 0 <= min(shares) <= max(shares) <= 1
    if age > 1:
        return
    # Resumed after two steps, the run draws what was under way again, and nothing twice.
    shutil.rmtree(folder / "global_step_4")
    shutil.rmtree(folder / "rollout")
    run(settings, *keys)
    for step in (3, 4):
        check_step(folder, step, [prompts[i] for i in batches[step - 1]])
    assert not (folder / "rollout" / "2.parquet").exists()
