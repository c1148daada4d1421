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


def test_a_pass_holds_a_rank_s_part_of_the_longest_sequence() -> None:
    """1,024 + 131,072 tokens over two ranks; a reference that isn't split needs them all."""
    long = ["data.max_response_length=131072", f"{ACTOR}.ulysses_sequence_parallel_size=2"]
    long += ["actor_rollout_ref.model.path=/nowhere", f"{ACTOR}.ppo_max_token_len_per_gpu=200000"]
    whole = "actor_rollout_ref.ref.ulysses_sequence_parallel_size=1"
    for others, tokens in ([], 66048), ([whole], 132096):
        found = gpu_settings(load_config([*BASE, *long, *others]), set())
        assert found[f"{ACTOR}.ppo_max_token_len_per_gpu"] == tokens


def test_on_a_cpu_nothing_changes() -> None:
    assert gpu_settings(load_config([*BASE, "trainer.device=cpu"]), set()) == {}
