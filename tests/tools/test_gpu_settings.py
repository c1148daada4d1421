"""Which settings of speed are left to users; tests/scripts has what the scripts make of them."""

import pytest

from tests.tools.test_memory_plan import BASE, OFFLOAD
from verl.config.load import load_config
from verl.tools.gpu_settings import gpu_settings

ACTOR = "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    "given",
    ["use_dynamic_bsz", "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size"],
)
def test_micro_batches_that_were_given_by_any_name_stay(given: str) -> None:
    config = load_config([*BASE, *OFFLOAD, "actor_rollout_ref.model.path=/nowhere"])
    assert f"{ACTOR}.use_dynamic_bsz" in gpu_settings(config, set())
    assert gpu_settings(config, {f"{ACTOR}.{given}"}) == {
        "actor_rollout_ref.rollout.enforce_eager": False
    }


def test_on_a_cpu_nothing_changes() -> None:
    assert gpu_settings(load_config([*BASE, "trainer.device=cpu"]), set()) == {}
