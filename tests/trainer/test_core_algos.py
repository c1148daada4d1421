"""The maths of a training step against numbers worked out by hand and padded-tensor formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import make_samples
from verl.trainer.config.schema import Config, resolve_aggregation
from verl.trainer.ppo.core_algos import (
    KL_ESTIMATORS,
    WEIGHTS,
    KLController,
    advantages,
    kl_divergence,
    policy_loss,
    response_weights,
)
from verl.workers.actor import LossConfig, ppo_loss

ALPHAS = (0.0, 0.5, 0.75, 1.0)
quick = settings(deadline=None, max_examples=50, derandomize=True)
length_lists = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


def close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
    )


# ---------------------------------------------------------------------------- response weights


WEIGHTS_BY_HAND = [
    ("token-mean", {}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("token-mean-legacy", {"group_size": 2}, [1 / 10, 1 / 10, 1 / 10, 0]),
    ("token-mean-legacy", {"group_size": 3}, [1 / 20, 1 / 20, 1 / 20, 0]),
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1 / 8, 1 / 8, 1 / 8]),
        ({"loss_agg_mode": "seq-mean-token-mean"}, [1 / 3, 1 / 6, 1 / 15]),
        ({"use_grpopp": True, "alpha": 0.0}, [1 / 60, 1 / 60, 1 / 60]),
        ({"use_dr_grpo": True}, [1 / 60, 1 / 60, 1 / 60]),
        # 1, 1/2 and 1/5 have the mean 17/30.
        ({"use_grpopp": True, "alpha": 1.0}, [30 / 17 / 60, 15 / 17 / 60, 6 / 17 / 60]),
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
        return policy_loss(self.log_probs, self.old, advantages.expand(self.N, self.M)).loss

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
        result = policy_loss(batch.log_probs, batch.old, batch.advantages)
        used.append([bool(x.any()) for x in (result.clipped, result.clipped_lower)])
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


# ---------------------------------------------------------------------------------- advantages

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


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_advantages_of_degenerate_batches_are_zero(estimator):
    close(advantages([5.0], [1], [3], estimator), [0])
    close(advantages([0.1, 0.1, 0.1], [1, 1, 1], [3, 0, 9], estimator), [0, 0, 0])
    close(advantages([1.0, 2.0], [1, 2], [0, 0], estimator), [0, 0])
    assert advantages([], [], [], estimator).tolist() == []


@quick
@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.integers(-2, 2), st.integers(1, 9)), min_size=2, max_size=12
    ),
    st.sampled_from(["grpo", "rloo", "reinforce_plus_plus_baseline"]),
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


# --------------------------------------------------------------------------------- policy loss


def per_ratio(ratios: list[float], advantage: float, **options: float) -> tuple[Any, list[float]]:
    log_probs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    old = torch.zeros_like(log_probs)
    result = policy_loss(log_probs, old, torch.full_like(old, advantage), **options)
    return result, torch.autograd.grad(result.loss.sum(), log_probs)[0].tolist()


def test_policy_loss_with_a_positive_advantage_by_hand():
    result, gradient = per_ratio([0.5, 1.1, 1.5, 4], 1.0, clip_ratio_high=0.28)
    close(result.loss, [-0.5, -1.1, -1.28, -1.28])
    assert result.clipped.tolist() == [0, 0, 1, 1]
    assert result.clipped_lower.tolist() == [0, 0, 0, 0]
    close(gradient, [-0.5, -1.1, 0, 0])
    close(result.log_ratio, [math.log(r) for r in (0.5, 1.1, 1.5, 4)])
    assert not result.log_ratio.requires_grad


def test_policy_loss_with_a_negative_advantage_by_hand():
    result, gradient = per_ratio([0.5, 0.9, 1.5, 4], -2.0, clip_ratio_low=0.3, clip_ratio_c=3)
    close(result.loss, [1.4, 1.8, 3.0, 6.0])
    assert result.clipped.tolist() == [1, 0, 0, 0]
    assert result.clipped_lower.tolist() == [0, 0, 0, 1]
    close(gradient, [0, 1.8, 3.0, 0])


def test_policy_loss_without_an_advantage_is_nothing():
    result, gradient = per_ratio([0.5, 1, 4], 0.0)
    assert result.loss.abs().tolist() == [0, 0, 0]
    assert result.clipped.tolist() == result.clipped_lower.tolist() == [0, 0, 0]
    close(gradient, [0, 0, 0])


def test_the_first_update_has_the_plain_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    values = torch.tensor([0.5, -3.0, 2.0])
    for low, high in ((0.2, 0.2), (0.0, 0.0)):
        result = policy_loss(log_probs, log_probs.detach(), values, low, high)
        close(result.loss, -values)
        close(torch.autograd.grad(result.loss.sum(), log_probs)[0], -values)


def test_policies_far_apart_give_finite_losses():
    log_probs = torch.tensor([-1e4, 0.0, -1e4, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -1e4, 0.0, -1e4])
    result = policy_loss(log_probs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    close(result.loss, [0, -1.2, 0.8, 3.0])
    close(torch.autograd.grad(result.loss.sum(), log_probs)[0], [0, 0, 0, 0])


def composed(
    logits: torch.Tensor, targets: torch.Tensor, samples: list[Any], config: LossConfig
) -> torch.Tensor:
    """Σ_i w_i Σ_t (clipped loss − entropy bonus + KL) from logits, response by response."""
    total, start = torch.zeros((), dtype=logits.dtype), 0
    for sample in samples:
        part = slice(start, start + sample.length)
        start += sample.length
        everything = logits[part].log_softmax(-1)
        log_probs = everything.gather(1, targets[part, None])[:, 0]
        old, ref = (
            torch.from_numpy(x).to(logits) for x in (sample.old_log_probs, sample.ref_log_probs)
        )
        ratio, a = (log_probs - old).exp(), sample.advantage
        bounds = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
        clipped = torch.maximum(-a * ratio, -a * ratio.clamp(*bounds))
        if a < 0:
            clipped = clipped.clamp(max=-a * config.clip_ratio_c)
        entropy = -(everything.exp() * everything).sum(-1)
        d = log_probs - ref
        tokens = clipped - config.entropy_coeff * entropy
        tokens = tokens + config.kl_coef * ((-d).exp() + d - 1).clamp(-10, 10)
        total = total + sample.weight * tokens.sum()
    return total


def test_gradient_of_the_whole_loss_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    samples = make_samples([2, 3, 1])
    samples[0].advantage, samples[1].advantage, samples[2].advantage = 1.3, -0.7, 0.4
    weights = response_weights([2, 3, 1], "delta-l", 4, 0.75)
    targets = torch.tensor([0, 3, 1, 2, 2, 4])
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    start = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].split([2, 3, 1])
    for sample, weight, now in zip(samples, weights, start, strict=True):
        sample.weight = weight.item()
        noise = torch.randn(2, len(now), generator=generator, dtype=torch.float64)
        sample.old_log_probs = (now + 0.3 * noise[0]).numpy()
        sample.ref_log_probs = (now + 0.5 * noise[1]).numpy()
    config = LossConfig(clip_ratio_high=0.28, entropy_coeff=0.02, kl_coef=0.1)

    numeric, step = torch.zeros_like(logits), 1e-6
    for i in range(6):
        for j in range(5):
            shift = torch.zeros_like(logits)
            shift[i, j] = step
            above, below = (composed(logits + s * shift, targets, samples, config) for s in (1, -1))
            numeric[i, j] = (above - below) / (2 * step)

    logits.requires_grad_()
    everything = logits.log_softmax(-1)
    entropy = -(everything.exp() * everything).sum(-1)
    chosen = everything.gather(1, targets[:, None])[:, 0]
    loss, sums = ppo_loss(chosen, entropy, samples, config)
    close(loss, composed(logits, targets, samples, config), rtol=1e-5)
    close(torch.autograd.grad(loss, logits)[0], numeric, rtol=1e-4, atol=1e-6)
    assert 0 < sums["pg_clipfrac"] < 6, "some tokens must be clipped, and some must not"


# ------------------------------------------------------------------------------------------- KL


def test_kl_estimators_by_hand():
    ln2 = math.log(2)
    log_probs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    ref = log_probs - torch.tensor([ln2, -ln2, 0])
    expected = {
        ("kl", "k1"): [ln2, -ln2, 0],
        ("abs",): [ln2, ln2, 0],
        ("mse", "k2"): [ln2**2 / 2, ln2**2 / 2, 0],
        ("low_var_kl", "k3"): [0.5 + ln2 - 1, 2 - ln2 - 1, 0],
    }
    assert {name for names in expected for name in names} == set(KL_ESTIMATORS)
    for names, values in expected.items():
        for name in names:
            close(kl_divergence(log_probs, ref, name), values)


@quick
@given(st.lists(st.floats(-50, 50, width=32), min_size=1))
def test_k3_is_never_negative_and_never_more_than_ten(log_ratios):
    d = torch.tensor(log_ratios, dtype=torch.float64)
    values = kl_divergence(d, torch.zeros_like(d), "k3")
    assert values.min() >= 0
    assert values.max() <= 10


def test_k3_is_clamped_far_away():
    d = torch.tensor([-2.0, -3.0, -1000.0, 1000.0], dtype=torch.float64)
    values = kl_divergence(d, torch.zeros_like(d), "k3")
    close(values, [math.exp(2) - 2 - 1, 10, 10, 10])


def test_expected_estimates_are_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    noise = torch.randn(50, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), (logits + 0.05 * noise).log_softmax(-1)
    true = (p.exp() * (p - q)).sum()
    assert true > 5e-4
    for name in ("k1", "k3"):
        close((p.exp() * kl_divergence(p, q, name)).sum(), true, rtol=1e-9)
    close((p.exp() * kl_divergence(p, q, "k2")).sum(), true, rtol=0.05)


def test_kl_controller_by_hand():
    fixed = KLController("fixed", 0.1)
    fixed.update(5.0, 100)
    assert fixed.value == 0.1

    adaptive = KLController("adaptive", 0.1, horizon=1000, target_kl=0.1)
    adaptive.update(0.11, 100)  # 10 % above the target
    assert adaptive.value == pytest.approx(0.1 * 1.01)
    adaptive.update(1.0, 100)  # 900 % above, bounded by 20 %
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02)
    adaptive.update(0.0, 500)  # 100 % below, bounded by 20 %
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)
