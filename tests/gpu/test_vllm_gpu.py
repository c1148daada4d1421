"""The main job with vLLM on GPUs: weights by CUDA IPC and by NCCL, sleep and wake-up."""

from pathlib import Path

import pytest
import torch

from tests.trainer.test_main_ppo import read, run, settings  # noqa: F401  a fixture
from tests.trainer.test_main_vllm import VLLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

# bfloat16 on both sides, with different kernels
TOLERANCE = "actor_rollout_ref.rollout.verify_weights_tolerance=0.05"
PLACES = {
    "colocated": (1, ()),
    "colocated-host": (1, ("actor_rollout_ref.rollout.weight_transfer=host",)),
    "split": (2, ("trainer.rollout_gpus_per_node=1",)),
    "split-ahead": (2, ("trainer.rollout_gpus_per_node=1", "trainer.async_rollout=True")),
}


@pytest.mark.parametrize("place", PLACES)
def test_main_job(place: str, settings: list[str], tmp_path: Path) -> None:  # noqa: F811
    gpus, overrides = PLACES[place]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    done = run(
        settings,
        *VLLM,
        TOLERANCE,
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
        "trainer.n_gpus_per_node=1",
        *overrides,
        f"trainer.default_local_dir={tmp_path}",
    )
    assert "is not the actor's model" not in done.stdout + done.stderr
    steps = read(tmp_path)
    assert steps[4]["critic/score/mean"] > 2 * steps[1]["critic/score/mean"]
    assert all(line["rollout/verify_logprob_diff"] < 0.05 for line in steps[1:])
