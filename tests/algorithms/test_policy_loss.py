"""Policy loss and divergences against numbers worked out by hand, and finite differences."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import close, make_samples, make_step
from verl.algorithms.losses import LossConfig, ppo_loss
from verl.models.packing import loss_inputs
from verl.protocol import OptimizerStep
from verl.trainer.ppo.core_algos import (
    KL_ESTIMATORS,
    adapted_kl_coef,
    kl_divergence,
    policy_loss,
)

quick = settings(deadline=None, max_examples=50, derandomize=True)


def per_ratio(ratios: list[float], advantage: float, **options: float) -> tuple[Any, list[float]]:
    log_probs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    old = torch.zeros_like(log_probs)
    loss, reported = policy_loss(log_probs, old, torch.full_like(old, advantage), **options)
    names = {"pg_clipfrac": "clipped", "pg_clipfrac_lower": "clipped_lower", "ppo_kl": "kl"}
    result = SimpleNamespace(loss=loss, **{names[k]: value for k, value in reported.items()})
    return result, torch.autograd.grad(loss.sum(), log_probs)[0].tolist()


def test_policy_loss_with_a_positive_advantage_by_hand():
    result, gradient = per_ratio([0.5, 1.1, 1.5, 4], 1.0, clip_ratio_high=0.28)
    close(result.loss, [-0.5, -1.1, -1.28, -1.28])
    assert result.clipped.tolist() == [0, 0, 1, 1]
    assert result.clipped_lower.tolist() == [0, 0, 0, 0]
    close(gradient, [-0.5, -1.1, 0, 0])
    close(result.kl, [-math.log(r) for r in (0.5, 1.1, 1.5, 4)])
    assert not result.kl.requires_grad


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
        loss, _ = policy_loss(log_probs, log_probs.detach(), values, low, high)
        close(loss, -values)
        close(torch.autograd.grad(loss.sum(), log_probs)[0], -values)


def test_policies_far_apart_give_finite_losses():
    log_probs = torch.tensor([-1e4, 0.0, -1e4, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -1e4, 0.0, -1e4])
    loss, _ = policy_loss(log_probs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    close(loss, [0, -1.2, 0.8, 3.0])
    close(torch.autograd.grad(loss.sum(), log_probs)[0], [0, 0, 0, 0])


def composed(
    logits: torch.Tensor, targets: torch.Tensor, step: OptimizerStep, config: LossConfig
) -> torch.Tensor:
    """Σ_i w_i Σ_t (clipped loss − entropy bonus + KL) from logits, response by response."""
    total, start = torch.zeros((), dtype=logits.dtype), 0
    for sample, weight in zip(step.samples, step.weights.tolist(), strict=True):
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
        total = total + weight * tokens.sum()
    return total


def test_gradient_of_the_whole_loss_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    samples = make_samples([2, 3, 1])
    samples[0].advantage, samples[1].advantage, samples[2].advantage = 1.3, -0.7, 0.4
    step = make_step(samples, "delta-l", max_response_length=4, alpha=0.75)
    targets = torch.tensor([0, 3, 1, 2, 2, 4])
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    start = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].split([2, 3, 1])
    for sample, now in zip(samples, start, strict=True):
        noise = torch.randn(2, len(now), generator=generator, dtype=torch.float64)
        sample.old_log_probs = (now + 0.3 * noise[0]).numpy()
        sample.ref_log_probs = (now + 0.5 * noise[1]).numpy()
    config = LossConfig(clip_ratio_high=0.28, entropy_coeff=0.02, kl_coef=0.1)

    numeric, small = torch.zeros_like(logits), 1e-6
    for i in range(6):
        for j in range(5):
            shift = torch.zeros_like(logits)
            shift[i, j] = small
            above, below = (composed(logits + s * shift, targets, step, config) for s in (1, -1))
            numeric[i, j] = (above - below) / (2 * small)

    logits.requires_grad_()
    everything = logits.log_softmax(-1)
    entropy = -(everything.exp() * everything).sum(-1)
    chosen = everything.gather(1, targets[:, None])[:, 0]
    loss, sums = ppo_loss(loss_inputs(step, chosen, entropy), config)
    close(loss, composed(logits, targets, step, config), rtol=1e-5)
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


def test_adapted_kl_coef_by_hand():
    beta = adapted_kl_coef(0.1, 0.11, 100, horizon=1000, target_kl=0.1)  # 10 % above the target
    assert beta == pytest.approx(0.1 * 1.01)
    beta = adapted_kl_coef(beta, 1.0, 100, 1000, 0.1)  # 900 % above, bounded by 20 %
    assert beta == pytest.approx(0.1 * 1.01 * 1.02)
    beta = adapted_kl_coef(beta, 0.0, 500, 1000, 0.1)  # 100 % below, bounded by 20 %
    assert beta == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)
