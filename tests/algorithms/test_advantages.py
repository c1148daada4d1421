"""Advantages against numbers worked out by hand."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import close
from verl.algorithms.advantages import gae, whitened
from verl.algorithms.losses import LOSSES, LossConfig, LossInputs
from verl.config.schema import ADV_ESTIMATORS
from verl.trainer.ppo.core_algos import (
    ADVANTAGES,
    advantages,
    compute_gae_advantage_return,
    compute_value_loss,
)

quick = settings(deadline=None, max_examples=50, derandomize=True)


VERL = json.loads((Path(__file__).parent / "data" / "advantages.json").read_text())

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 3.0]
GROUPS = [7, -3, 7, -3, 7, 2]  # 7: 1, 0, 0.5; -3: 0, 1; 2: 3 alone
LENGTHS = [4, 1, 2, 5, 3, 6]


def test_grpo_by_hand():
    with_std = advantages(REWARDS, GROUPS, LENGTHS, "grpo", norm_by_std=True)
    a, b = 0.5 / (0.5 + 1e-6), 0.5 / (math.sqrt(0.5) + 1e-6)
    assert with_std.dtype == torch.float64
    close(with_std, [a, -b, -a, b, 0, 0], rtol=1e-12)
    without = advantages(REWARDS, GROUPS, LENGTHS, "grpo", norm_by_std=False)
    close(without, [0.5, -0.5, -0.5, 0.5, 0, 0], rtol=1e-12)


def test_grpo_by_the_standard_deviation_of_the_batch():
    # The rewards' mean is 5.5/6; the sum of squares is 1 + 1 + 0.25 + 9 = 11.25.
    std = math.sqrt((11.25 - 5.5**2 / 6) / 5)
    values = advantages(REWARDS, GROUPS, LENGTHS, "grpo", norm_by_std="batch")
    close(values, [x / std for x in (0.5, -0.5, -0.5, 0.5, 0, 0)], rtol=1e-5)
    close(advantages([2.0], [0], [1], "grpo", norm_by_std="batch"), [0])


@pytest.mark.parametrize(
    "case", VERL["cases"], ids=lambda c: f"{c['estimator']}-{c['norm_by_std']}"
)
def test_estimators_agree_with_verls_own(case):
    """Numbers of verl's functions, of the version that the file names."""
    others = {}
    if keys := case.get("gdpo_reward_keys"):
        others["components"] = [VERL["components"][key] for key in keys]
        others["component_weights"] = case.get("gdpo_reward_weights")
    if case["estimator"] == "remax":
        others["baselines"] = VERL["greedy"]
    given = VERL["rewards"], VERL["groups"], VERL["lengths"]
    values = advantages(*given, case["estimator"], case["norm_by_std"], **others)
    close(values, case["advantages"], rtol=1e-6, atol=1e-6)


def test_every_estimator_can_be_chosen_and_was_compared():
    known = set(ADV_ESTIMATORS) - {"gae"}
    assert set(ADVANTAGES) == known == {c["estimator"] for c in VERL["cases"]}


def test_opo_and_gpg_by_hand():
    # 7: (4·1 + 2·0 + 3·0.5)/9; -3: (1·0 + 5·1)/6; 2: 3 alone
    opo = [1 - 5.5 / 9, -5 / 6, -5.5 / 9, 1 / 6, 0.5 - 5.5 / 9, 0]
    close(advantages(REWARDS, GROUPS, LENGTHS, "opo"), opo, rtol=1e-9)
    # Four of six rewards are not 0.
    gpg = [x * 6 / 4 for x in (0.5, -0.5, -0.5, 0.5, 0, 0)]
    close(advantages(REWARDS, GROUPS, LENGTHS, "gpg"), gpg, rtol=1e-9)


def test_passk_rewards_the_best_alone_by_what_it_adds():
    rewards, groups = [3.0, 1.0, 2.0, 5.0, 5.0, 0.0, 7.0], [1, 1, 1, 2, 2, 2, 3]
    values = advantages(rewards, groups, [1] * 7, "grpo_passk", norm_by_std=False)
    close(values, [1, 0, 0, 0, 0, 0, 0])  # a tie for the best adds nothing; one alone leads nobody
    values = advantages(rewards, groups, [1] * 7, "grpo_passk")
    close(values[:3], [1, 0, 0], rtol=1e-5)  # the standard deviation of 3, 1, 2 is 1


def test_gdpo_lets_no_component_drown():
    """GRPO on the sum hardly sees the second component; alone, each has the same say."""
    small, groups = [0.0, 1.0, 0.0, 1.0], [1, 1, 1, 1]
    large = [100 * x for x in (0.0, 0.0, 1.0, 1.0)]
    values = advantages([0.0] * 4, groups, [1] * 4, "gdpo", components=[small, large])
    close(values, [-math.sqrt(1.5), 0, 0, math.sqrt(1.5)], rtol=1e-4, atol=1e-5)


def test_rloo_by_hand():
    # 1 − (0 + 0.5)/2, 0 − 1, 0 − (1 + 0.5)/2, 1 − 0, 0.5 − (1 + 0)/2, alone
    values = advantages(REWARDS, GROUPS, LENGTHS, "rloo")
    close(values, [0.75, -1, -0.75, 1, 0, 0], rtol=1e-12)


def test_reinforce_plus_plus_baseline_is_masked_whitening():
    lengths = [4, 1, 2, 5, 3, 6]
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).double()
    centred = torch.tensor([0.5, -0.5, -0.5, 0.5, 0, 0], dtype=torch.float64)
    values = centred[:, None].expand(6, 8)
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8) * mask
    ours = advantages(REWARDS, GROUPS, lengths, "reinforce_plus_plus_baseline")
    close(ours[:, None] * mask, whitened, rtol=1e-12)
    tokens = ours.repeat_interleave(torch.tensor(lengths))
    close([tokens.mean(), tokens.var()], [0, 1], rtol=1e-6)


OF_GROUPS = ["grpo", "rloo", "reinforce_plus_plus_baseline", "grpo_passk", "opo", "gpg"]


@pytest.mark.parametrize("estimator", OF_GROUPS)
def test_advantages_of_degenerate_batches_are_zero(estimator):
    close(advantages([5.0], [1], [3], estimator), [0])
    close(advantages([0.1, 0.1, 0.1], [1, 1, 1], [3, 0, 9], estimator), [0, 0, 0])
    if estimator != "opo":  # whose baseline weighs by length
        close(advantages([1.0, 2.0], [1, 2], [0, 0], estimator), [0, 0])
    assert advantages([], [], [], estimator).tolist() == []


@quick
@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.integers(-2, 2), st.integers(1, 9)), min_size=2, max_size=12
    ),
    st.sampled_from([*OF_GROUPS, "reinforce_plus_plus"]),
    st.randoms(use_true_random=False),
)
def test_advantages_follow_a_permutation_of_the_responses(rows, estimator, random):
    order = random.sample(range(len(rows)), len(rows))
    values = advantages(*zip(*rows, strict=True), estimator)
    shuffled = advantages(*zip(*(rows[i] for i in order), strict=True), estimator)
    close(shuffled, values[order], rtol=1e-6, atol=1e-6)


@quick
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=12))
def test_grpo_and_rloo_advantages_add_up_to_zero_in_each_group(rows):
    rewards, groups = zip(*rows, strict=True)
    for estimator in ("grpo", "rloo"):
        values = advantages(rewards, groups, [1] * len(rows), estimator)
        for group in set(groups):
            close(values[torch.tensor(groups) == group].sum(), 0, atol=1e-6)


GAE = json.loads((Path(__file__).parent / "data" / "gae.json").read_text())


def counted(name: str) -> torch.Tensor:
    """Numbers of all tokens that count, response after response."""
    rows = zip(GAE[name], GAE["mask"], strict=True)
    return torch.tensor([v for row, mask in rows for v, m in zip(row, mask, strict=True) if m])


@pytest.mark.parametrize("case", GAE["cases"], ids=lambda c: f"{c['gamma']}-{c['lam']}")
def test_gae_and_the_value_loss_agree_with_verls_own(case):
    """With a tool's tokens in one response, which stay out."""
    lengths = torch.tensor([sum(mask) for mask in GAE["mask"]])
    rewards, values = counted("kl_rewards").double(), counted("values").double()
    rewards[lengths.cumsum(0) - 1] += torch.tensor(GAE["scores"])
    found = gae(rewards, values, lengths, case["gamma"], case["lam"])
    returns = found + values
    close(returns, list(chain(*case["returns"])), atol=2e-4)
    white = whitened(found, torch.ones_like(found))
    close(white, list(chain(*case["advantages"])), atol=2e-4)
    new, weights = counted("new_values"), torch.full_like(values, 1 / len(values))
    x = LossInputs(new, new, lengths, weights, weights, white, values=values, returns=returns)
    loss, sums = LOSSES["value"](x, LossConfig(cliprange_value=0.2))
    assert loss.item() == pytest.approx(case["vf_loss"], abs=1e-4)
    assert sums["vf_clipfrac"].item() / len(values) == pytest.approx(case["vf_clipfrac"], abs=1e-6)


@pytest.mark.parametrize("case", GAE["cases"], ids=lambda c: f"{c['gamma']}-{c['lam']}")
def test_verls_names_of_gae_and_the_value_loss(case):
    mask, values, new = (torch.tensor(GAE[k]) for k in ("mask", "values", "new_values"))
    rewards = torch.tensor(GAE["kl_rewards"])
    rewards[range(4), [n - 1 for n in GAE["lengths"]]] += torch.tensor(GAE["scores"])
    given = rewards, values, mask, case["gamma"], case["lam"]
    advantages_, returns = compute_gae_advantage_return(*given)
    close(advantages_[mask.bool()], list(chain(*case["advantages"])), atol=2e-4)
    loss, clipped = compute_value_loss(new, returns, values, mask, 0.2)
    assert loss.item() == pytest.approx(case["vf_loss"], abs=1e-4)
    assert clipped.item() == pytest.approx(case["vf_clipfrac"], abs=1e-6)


def test_gae_by_hand():
    """Two responses of ragged lengths, and one without a token."""
    values = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    # δ of the second token is 1 − 0.25, of the first 0.8·0.25 − 0.5; then 0.8·0.5·0.75 more.
    close(gae(rewards, values, torch.tensor([2, 0, 1]), 0.8, 0.5), [0.0, 0.75, -0.5])
    close(gae(rewards[:0], values[:0], torch.tensor([0]), 1, 1), [])
