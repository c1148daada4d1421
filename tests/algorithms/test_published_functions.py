"""The functions of [batch, time] tensors by their published names, against the published ones.

`data/published_functions.json` holds random inputs, and what the functions of the paper's code (of
a fork of verl 0.4) gave for them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import close
from verl.algorithms.losses import LossConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import (
    ADVANTAGES,
    POLICY_LOSSES,
    advantages,
    agg_loss,
    compute_grpo_outcome_advantage,
    compute_policy_loss,
    register_adv_est,
    register_policy_loss,
    response_weights,
)
from verl.utils import torch_functional

PEER = json.loads((Path(__file__).parent / "data" / "published_functions.json").read_text())
LENGTHS = torch.tensor(PEER["lengths"])
WIDTH = len(PEER["log_prob"][0])
MASK = (torch.arange(WIDTH) < LENGTHS[:, None]).double()
REWARDS, LOG_PROB, OLD, REF, ADVANTAGE, BASELINES = (
    torch.tensor(PEER[name], dtype=torch.float64)
    for name in (
        "token_level_rewards",
        "log_prob",
        "old_log_prob",
        "ref_log_prob",
        "advantages",
        "reward_baselines",
    )
)
OUTCOME = {"token_level_rewards": REWARDS, "response_mask": MASK}
INPUTS: dict[str, dict[str, Any]] = {
    "compute_policy_loss": dict(
        old_log_prob=OLD, log_prob=LOG_PROB, advantages=ADVANTAGE, response_mask=MASK
    ),
    "kl_penalty": {"logprob": LOG_PROB, "ref_logprob": REF},
    "agg_loss": {"loss_mat": LOG_PROB, "loss_mask": MASK},
    "compute_remax_outcome_advantage": OUTCOME | {"reward_baselines": BASELINES},
}
RETURNS_ARE_REWARDS = (
    "compute_remax_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
)
NEW_VERL = {"seq-mean-token-sum-norm": 1 / len(LENGTHS)}
"""Modes that the published code didn't divide by the number of responses."""


def call(name: str, **kwargs: Any) -> Any:
    found = getattr(core_algos, name, None) or getattr(torch_functional, name)
    if name.startswith("masked"):
        return found(LOG_PROB, MASK, **kwargs)
    return found(**INPUTS.get(name, OUTCOME | {"index": PEER["index"]}), **kwargs)


@pytest.mark.parametrize(
    "case", PEER["cases"], ids=lambda case: f"{case['function']}{[*case['kwargs'].values()]}"
)
def test_functions_are_the_published_ones(case: dict[str, Any]) -> None:
    found = call(case["function"], **case["kwargs"])
    found = found if isinstance(found, tuple) else (found,)
    expected = case["results"]
    if case["function"] in RETURNS_ARE_REWARDS:
        expected = expected[:1] * 2
    factor = NEW_VERL.get(case["kwargs"].get("loss_agg_mode"), 1.0)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, torch.tensor(theirs) * factor, rtol=2e-6, atol=2e-6)


def test_every_function_is_compared() -> None:
    names = {name for name in vars(core_algos) if name.startswith("compute_")}
    names -= {"compute_outcome_advantage", "compute_gpg_outcome_advantage"}  # as ADVANTAGES
    names -= {"compute_gae_advantage_return", "compute_value_loss"}  # in test_advantages.py
    assert names <= {case["function"] for case in PEER["cases"]}


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_two_published_functions_are_the_weights(alpha: float) -> None:
    """The factors in the advantages and the mean over all cells are Σ_i w_i Σ_t ℓ_it."""
    flags = {"use_grpopp": True, "grpopp_config": {"alpha": alpha}}
    values, _ = compute_grpo_outcome_advantage(REWARDS, MASK, PEER["index"], **flags)
    found = compute_policy_loss(LOG_PROB, LOG_PROB, values, MASK, **flags)[0]
    w = response_weights(LENGTHS, "delta-l", WIDTH, alpha).double()
    groups = [0, 0, 0, 1, 1, 1]
    close(found, -(w * LENGTHS * advantages(REWARDS.sum(-1), groups, LENGTHS)).sum())


def test_any_aggregation_and_any_horizon() -> None:
    losses = torch.ones(2, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert agg_loss(losses, mask, "token-sum") == 4
    close(agg_loss(losses, mask, "dr-grpo", loss_scale_factor=10), 4 / 20)
    losses[0, 1:] = torch.nan  # padding
    assert agg_loss(losses, mask, "token-mean") == 1
    with pytest.raises(ValueError, match="choose one of token-mean"):
        agg_loss(losses, mask, "mean")


def test_contradictions_and_too_few_values() -> None:
    with pytest.raises(ValueError, match="two methods"):
        call("compute_grpo_outcome_advantage", use_grpopp=True, use_dr_grpo=True)
    with pytest.raises(ValueError, match="two values or more, not 1"):
        torch_functional.masked_var(torch.ones(2), torch.tensor([1, 0]))


def test_registered_functions_are_where_the_others_are() -> None:
    try:

        @register_adv_est("twice")
        def twice(rewards: Any, groups: Any, **_: Any) -> Any:
            return 2 * rewards

        @register_policy_loss("minus")
        def minus(log_probs: Any, old: Any, advantages: Any, **_: Any) -> Any:
            return -log_probs, {}

        assert advantages([1.0, 3.0], [0, 0], [1, 1], "twice").tolist() == [2, 6]
        assert POLICY_LOSSES[LossConfig(loss_mode="minus").loss_mode] is minus
        assert register_adv_est("twice")(twice) is twice
        with pytest.raises(ValueError, match="there is another twice already"):
            register_adv_est("twice")(minus)
    finally:
        ADVANTAGES.pop("twice", None)
        POLICY_LOSSES.pop("minus", None)
