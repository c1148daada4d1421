"""The main job with vLLM: colocated and split, weights over a process group, one step ahead."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import whole_run
from tests.models.families import make_family
from tests.trainer.test_main_ppo import read, run, settings  # noqa: F401  a fixture
from verl.cluster import WorkerGroup

pytestmark = [
    whole_run,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="bash setup.sh cpu --vllm"),
]

VLLM = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.max_num_seqs=64",
    "actor_rollout_ref.rollout.verify_weights=True",
    "actor_rollout_ref.rollout.verify_weights_tolerance=1e-4",
)


def test_two_ranks_and_two_engines(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(settings, *VLLM, f"trainer.default_local_dir={tmp_path}")
    assert "is not the actor's model" not in caplog.text
    steps = read(tmp_path)
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert steps[4]["critic/score/mean"] > 3 * steps[1]["critic/score/mean"]
    for line in steps[1:]:
        # Two updates a step: the old log-probabilities are the actor's own.
        assert line["rollout/logprob_diff_max"] < 1e-4
        assert line["rollout/verify_logprob_diff"] < 1e-4
        assert line["rollout/policy_age_max"] == 0


SPLIT = (
    *VLLM,
    "trainer.n_gpus_per_node=1",
    "trainer.rollout_gpus_per_node=1",
    "trainer.async_rollout=True",
    "trainer.total_training_steps=6",
    "actor_rollout_ref.rollout.weight_transfer=nccl",  # by gloo
)


def test_split_and_one_step_ahead(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit, calls = WorkerGroup.submit, set[str]()

    def submit_and_note(group: WorkerGroup, method: str, *args: Any, **options: Any) -> Any:
        calls.add(method)
        return submit(group, method, *args, **options)

    monkeypatch.setattr(WorkerGroup, "submit", submit_and_note)
    run(settings, *SPLIT, f"trainer.default_local_dir={tmp_path}")
    assert "is not the actor's model" not in caplog.text
    assert "join_engines" in calls  # a group for the broadcast, which a CPU doesn't have by itself
    steps = read(tmp_path)
    assert all(line["rollout/verify_logprob_diff"] < 1e-4 for line in steps[1:])
    ages = [(line["rollout/policy_age_mean"], line["rollout/policy_age_max"]) for line in steps[1:]]
    assert ages == [(0, 0), *[(1, 1)] * 5]
    assert steps[6]["critic/score/mean"] > 2 * steps[1]["critic/score/mean"]
    # Resumed from step 4, with the batch that was drawn ahead: the same steps again.
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("4")
    run(settings, *SPLIT, f"trainer.default_local_dir={tmp_path}")
    for before, after in zip(steps, read(tmp_path), strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


def test_a_start_ends_where_vllm_computes_another_model(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has no windows for Qwen2-MoE, whatever the configuration says."""
    model = make_family("Qwen2-MoE, windows", tmp_path / "model")
    one = (f"actor_rollout_ref.model.path={model}", "trainer.n_gpus_per_node=1")
    with pytest.raises(SystemExit) as stopped:
        run(settings, *VLLM[:2], *one, f"trainer.default_local_dir={tmp_path}/run")
    assert stopped.value.code == 2
    assert "error: engine 0 is not the actor's model" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()
