"""Response weights against numbers worked out by hand, and losses against padded formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import close
from verl.algorithms.weights import resolve_aggregation
from verl.config.schema import Config
from verl.trainer.ppo.core_algos import (
    WEIGHTS,
    policy_loss,
    response_weights,
)

ALPHAS = (0.0, 0.5, 0.75, 1.0)
quick = settings(deadline=None, max_examples=50, derandomize=True)
length_lists = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


# ---------------------------------------------------------------------------- response weights


WEIGHTS_BY_HAND = [
    ("token-mean", {}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("token-mean-legacy", {"group_size": 2}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("token-mean-legacy", {"group_size": 3}, [1 / 20, 1 / 20, 1 / 20, 0]),
    ("token-sum", {}, [1, 1, 1, 0]),
    ("luspo", {}, [1 / 4, 1 / 4, 1 / 4, 0]),
    ("lambda-grpo", {"alpha": 0.0}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("lambda-grpo", {"alpha": 1.0, "groups": [0, 1, 2, 3]}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("seq-mean-token-mean", {}, [1 / 8, 1 / 12, 1 / 20, 0]),
    ("seq-mean-token-sum", {}, [1 / 4, 1 / 4, 1 / 4, 0]),
    ("seq-mean-token-sum-norm", {}, [1 / 40, 1 / 40, 1 / 40, 0]),
    ("dr-grpo", {}, [1 / 40, 1 / 40, 1 / 40, 0]),
    ("delta-l", {"alpha": 0.0}, [1 / 40, 1 / 40, 1 / 40, 0]),
    # L̄ = 10/3; its ratios to the lengths, 5/3, 10/9 and 2/3, have the mean 31/27.
    ("delta-l", {"alpha": 1.0}, [45 / 31 / 40, 30 / 31 / 40, 18 / 31 / 40, 0]),
]


@pytest.mark.parametrize(("mode", "options", "expected"), WEIGHTS_BY_HAND)
def test_weights_by_hand(mode, options, expected):
    weights = response_weights([2, 3, 5, 0], mode, 10, **options)
    assert weights.dtype == torch.float32
    close(weights, expected)
    close(response_weights(torch.tensor([2, 3, 5, 0]), mode, 10, **options), expected)


def test_every_mode_is_in_the_table_by_hand():
    assert {mode for mode, _, _ in WEIGHTS_BY_HAND} == set(WEIGHTS)


def test_delta_l_between_the_extremes_by_hand():
    # 1^(−1/2) = 1 and 4^(−1/2) = 1/2 have the mean 3/4.
    close(response_weights([1, 4], "delta-l", 10, 0.5), [4 / 3 / 20, 2 / 3 / 20])


@pytest.mark.parametrize("alpha", [1.0, -2.0])
def test_lambda_grpo_by_hand(alpha):
    # z = −1 and 1 in both groups of two, h = 8/9 and 10/9, and 2·softmax of h^(−α).
    a, b = math.exp((8 / 9) ** -alpha), math.exp((10 / 9) ** -alpha)
    weights = response_weights([2, 4, 9, 5], "lambda-grpo", 10, alpha, groups=[7, 7, 3, 3])
    close(weights, [x / (a + b) * 2 / 20 for x in (a, b, b, a)], rtol=1e-5)
    assert (weights[0] > weights[1]) == (alpha > 0)
    extreme = response_weights([1, 8000, 8001, 8002] * 99, "lambda-grpo", 10, 5 * alpha)
    assert extreme.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1 / 8, 1 / 8, 1 / 8]),
        ({"loss_agg_mode": "seq-mean-token-mean"}, [1 / 3, 1 / 6, 1 / 15]),
        ({"use_grpopp": True, "alpha": 0.0}, [1 / 60, 1 / 60, 1 / 60]),
        ({"use_dr_grpo": True}, [1 / 60, 1 / 60, 1 / 60]),
        # 1, 1/2 and 1/5 have the mean 17/30.
        ({"use_grpopp": True, "alpha": 1.0}, [30 / 17 / 60, 15 / 17 / 60, 6 / 17 / 60]),
        ({"loss_agg_mode": "delta-l", "alpha": 1.0}, [30 / 17 / 60, 15 / 17 / 60, 6 / 17 / 60]),
        ({"loss_agg_mode": "seq-mean-token-sum"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, [1 / 60, 1 / 60, 1 / 60]),
    ],
)
def test_configuration_flags_choose_the_weights(flags, expected):
    config = Config()
    config.data.max_response_length = 20
    for name, value in flags.items():
        for section in (config.algorithm, config.actor_rollout_ref.actor):
            if name == "alpha":
                section.grpopp_config.alpha = value
            elif hasattr(section, name):
                setattr(section, name, value)
    a = resolve_aggregation(config)
    close(response_weights([1, 2, 5], a.mode, a.max_response_length, a.alpha), expected)
    assert a.norm_by_std is not flags.get("use_dr_grpo", False)


@quick
@given(length_lists)
def test_delta_l_joins_dr_grpo_norm_and_grpo_norm(lengths):
    torch.testing.assert_close(
        response_weights(lengths, "delta-l", 8192, 0.0), response_weights(lengths, "dr-grpo", 8192)
    )
    ratio = response_weights(lengths, "delta-l", 8192, 1.0) / response_weights(
        lengths, "seq-mean-token-mean", 8192
    )
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@quick
@given(length_lists, st.integers(2, 9), st.sampled_from(ALPHAS))
def test_delta_l_knows_no_unit_of_length(lengths, factor, alpha):
    torch.testing.assert_close(
        response_weights([factor * n for n in lengths], "delta-l", 8192, alpha),
        response_weights(lengths, "delta-l", 8192, alpha),
    )


@quick
@given(length_lists, st.sampled_from((*ALPHAS, 2.0)))
def test_delta_l_weights_have_the_mean_of_dr_grpo(lengths, alpha):
    weights = response_weights(lengths, "delta-l", 8192, alpha)
    close(weights.double().sum() * 8192, 1.0, rtol=1e-5)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    assert weights[longest_first].diff().min() >= 0 if len(lengths) > 1 else True


@quick
@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    st.sampled_from([mode for mode in WEIGHTS if mode != "token-mean-legacy"]),
    st.randoms(use_true_random=False),
)
def test_weights_follow_a_permutation_of_the_responses(lengths, mode, random):
    order = random.sample(range(len(lengths)), len(lengths))
    torch.testing.assert_close(
        response_weights([lengths[i] for i in order], mode, 8192, 0.75),
        response_weights(lengths, mode, 8192, 0.75)[order],
    )


def test_delta_l_averages_over_the_rollout_batch():
    # 16^(−1/2) = 1/4, twice: the mean over the rollout batch is (1 + 1/2 + 1/4 + 1/4) / 4 = 1/2.
    rollout = [1, 4, 16, 16]
    close(response_weights([1, 4], "delta-l", 10, 0.5, rollout), [2 / 20, 1 / 20])
    close(response_weights([16, 16], "delta-l", 10, 0.5, rollout), [0.5 / 20, 0.5 / 20])
    # The mini-batches, averaged, are the whole batch.
    whole = response_weights(rollout, "delta-l", 10, 0.5)
    close(whole, [2 / 40, 1 / 40, 0.5 / 40, 0.5 / 40])


def test_other_modes_ignore_the_rollout_batch():
    for mode in set(WEIGHTS) - {"delta-l"}:
        options = {"group_size": 2} if mode == "token-mean-legacy" else {}
        torch.testing.assert_close(
            response_weights([3, 7, 2], mode, 9, rollout_lengths=[3, 7, 2, 100], **options),
            response_weights([3, 7, 2], mode, 9, **options),
        )


def test_delta_l_leaves_empty_responses_out_of_its_mean():
    # mean of 1 and 1/2 over the two that are present; N counts all four.
    expected = [4 / 3 / 40, 0, 2 / 3 / 40, 0]
    close(response_weights([1, 0, 4, 0], "delta-l", 10, 0.5), expected)


@pytest.mark.parametrize("mode", WEIGHTS)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0], []])
def test_without_tokens_all_weights_are_zero(mode, lengths):
    weights = response_weights(lengths, mode, 10, 0.75, group_size=2)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [0] * len(lengths)


def test_legacy_token_mean_with_a_smaller_last_group():
    # (2, 3) and (4): two groups, each the mean over its own tokens.
    weights = response_weights([2, 3, 4], "token-mean-legacy", 10, group_size=2)
    close(weights, [1 / 10, 1 / 10, 1 / 8])


def test_one_response_alone_has_the_same_gradient_in_both_means():
    for mode in ("token-mean", "seq-mean-token-mean"):
        close(response_weights([7], mode, 100), [1 / 7])


def test_arguments_that_can_not_be_used():
    with pytest.raises(ValueError, match="mean") as error:
        response_weights([1, 2], "mean", 10)
    assert all(mode in str(error.value) for mode in WEIGHTS)
    with pytest.raises(ValueError, match="negative"):
        response_weights([1, -2], "token-mean", 10)
    with pytest.raises(ValueError, match="group_size"):
        response_weights([1, 2], "token-mean-legacy", 10)


# ---------------------------------------------------- padded formulas equal the weighted sums


class Padded:
    """A batch [N, M] with an advantage per response and log-ratios around `spread`."""

    def __init__(self, spread: float, lengths: tuple[int, ...] = (1, 4, 7, 12, 3, 9)) -> None:
        generator = torch.Generator().manual_seed(3)
        self.lengths, self.N, self.M = torch.tensor(lengths), len(lengths), 12
        shape = (self.N, self.M)
        self.mask = (torch.arange(self.M) < self.lengths[:, None]).double()
        self.old = -3 + torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.log_probs = (self.old + spread * noise).requires_grad_()
        self.advantages = torch.randn(self.N, 1, generator=generator, dtype=torch.float64)

    def loss(self, advantages: torch.Tensor) -> torch.Tensor:
        return policy_loss(self.log_probs, self.old, advantages.expand(self.N, self.M))[0]

    def weighted_sum(self, mode: str, **options: Any) -> torch.Tensor:
        w = response_weights(self.lengths, mode, self.M, **options).double()
        return (w * (self.loss(self.advantages) * self.mask).sum(1)).sum()

    def assert_same(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        close(ours, theirs)
        gradients = [
            torch.autograd.grad(x, self.log_probs, retain_graph=True)[0] for x in (ours, theirs)
        ]
        close(*gradients)
        assert gradients[0].abs().max() > 1e-3


# 0.01: no ratio is clipped; 1.0: some are clipped; 3.0: the dual clip acts as well.
spreads = pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])


def test_the_batches_cover_all_branches_of_the_loss():
    used = []
    for spread in (0.01, 1.0, 3.0):
        batch = Padded(spread)
        _, reported = policy_loss(batch.log_probs, batch.old, batch.advantages)
        used.append([bool(reported[k].any()) for k in ("pg_clipfrac", "pg_clipfrac_lower")])
    assert used == [[False, False], [True, True], [True, True]]


@spreads
@pytest.mark.parametrize("alpha", ALPHAS)
def test_published_delta_l_scales_advantages_and_averages_all_cells(spread, alpha):
    batch = Padded(spread)
    L = batch.lengths.double()
    power = (L / L.mean()) ** -alpha
    scaled = batch.advantages * (power / power.mean())[:, None]
    published = (batch.loss(scaled) * batch.mask).sum() / (batch.N * batch.M)
    batch.assert_same(batch.weighted_sum("delta-l", alpha=alpha), published)


@spreads
def test_dapo_norm_is_the_masked_mean(spread):
    batch = Padded(spread)
    published = (batch.loss(batch.advantages) * batch.mask).sum() / batch.mask.sum()
    batch.assert_same(batch.weighted_sum("token-mean"), published)


@spreads
def test_grpo_norm_is_the_mean_of_masked_row_means(spread):
    batch = Padded(spread)
    rows = (batch.loss(batch.advantages) * batch.mask).sum(1) / batch.mask.sum(1)
    batch.assert_same(batch.weighted_sum("seq-mean-token-mean"), rows.mean())


@spreads
def test_dr_grpo_is_the_mean_of_row_sums_over_the_constant_width(spread):
    batch = Padded(spread)
    rows = (batch.loss(batch.advantages) * batch.mask).sum(1)
    batch.assert_same(batch.weighted_sum("dr-grpo"), (rows / batch.M).mean())
    batch.assert_same(batch.weighted_sum("seq-mean-token-sum"), rows.mean())


@spreads
def test_legacy_token_mean_averages_micro_batches(spread):
    batch = Padded(spread)
    losses = batch.loss(batch.advantages) * batch.mask
    parts = [losses[i : i + 2].sum() / batch.mask[i : i + 2].sum() for i in (0, 2, 4)]
    published = sum(parts) / 3
    batch.assert_same(batch.weighted_sum("token-mean-legacy", group_size=2), published)
