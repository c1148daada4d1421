"""Every policy loss against verl's own function, finite differences, and each split of the work.

`data/policy_losses.json` holds random inputs of 26 tokens, and what verl 0.9.1's functions (VESPO:
TRL's) gave for them: the loss, its gradient and the metrics.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import close, make_samples, make_step
from verl.algorithms.losses import LossConfig, LossInputs, ppo_loss
from verl.algorithms.policy_losses import (
    POLICY_LOSSES,
    SELECTIONS,
    Constants,
    clip_cov_tokens,
    kl_cov_tokens,
    low_entropy,
)
from verl.algorithms.weights import WEIGHTS, response_weights
from verl.config.schema import LOSS_MODES
from verl.models.packing import loss_inputs
from verl.utils.seqlen_balancing import balanced_partitions

PEER = json.loads((Path(__file__).parent / "data" / "policy_losses.json").read_text())
LENGTHS = torch.tensor(PEER["lengths"])
LOG_PROBS, OLD = (
    torch.tensor(PEER[name], dtype=torch.float64) for name in ("log_probs", "old_log_probs")
)
ADVANTAGES = torch.tensor(PEER["advantages"], dtype=torch.float64).repeat_interleave(LENGTHS)
CASES = {case["loss_mode"]: case for case in PEER["cases"]}
CASES["gspo-token"] = CASES["gspo"] | {"loss_mode": "gspo-token"}
RANDOM = np.random.default_rng(0)


def selected(mode: str, constants: Constants, log_probs: Tensor = OLD) -> Tensor | None:
    select = SELECTIONS.get(mode)
    return select and select(log_probs, ADVANTAGES, constants, RANDOM)


def token_losses(mode: str, log_probs: Tensor, constants: Constants, chosen: Any) -> Any:
    more = {"lengths": LENGTHS, "c": constants, "selected": chosen}
    return POLICY_LOSSES[mode](log_probs, OLD, ADVANTAGES, **more)


def test_every_loss_can_be_asked_for_and_is_compared_with_a_peers() -> None:
    assert {*LOSS_MODES} == POLICY_LOSSES.keys() == CASES.keys()


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_losses_are_the_peers(mode: str) -> None:
    """With the weights that the peer's function takes. It selects by the current policy."""
    case = CASES[mode]
    constants = Constants(**case["constants"])
    chosen = selected(mode, constants, LOG_PROBS)
    if mode == "clip_cov":  # where the peer leaves out what PPO's clip cuts
        chosen = torch.tensor(case["selected"], dtype=torch.float64)
    log_probs = LOG_PROBS.clone().requires_grad_()
    losses, reported = token_losses(mode, log_probs, constants, chosen)
    w = response_weights(LENGTHS, case["loss_agg_mode"], 10).double().repeat_interleave(LENGTHS)
    close((w * losses).sum(), case["loss"], rtol=1e-6)
    close(torch.autograd.grad((w * losses).sum(), log_probs)[0], case["gradient"], rtol=1e-5)
    for name, value in case["metrics"].items():
        close(reported[name].mean() if name in reported else 0.0, value, atol=1e-6)
    assert np.count_nonzero(case["gradient"]) > 3
    assert not any(x.requires_grad for x in reported.values())


@pytest.mark.parametrize("mode", ["vanilla", "geo_mean", "sapo", "kl_cov", "gpg", "clip_cov"])
def test_gradients_of_losses_against_finite_differences(mode: str) -> None:
    """Of those without stopped gradients. Weights that differ, for a response-level loss too."""
    constants = Constants(**CASES[mode]["constants"])
    chosen = selected(mode, constants)
    weights = response_weights(LENGTHS, "delta-l", 10, 0.75).double().repeat_interleave(LENGTHS)

    def loss(log_probs: Tensor) -> Tensor:
        return (weights * token_losses(mode, log_probs, constants, chosen)[0]).sum()

    assert torch.autograd.gradcheck(loss, LOG_PROBS.clone().requires_grad_(), eps=1e-7)


FACTORS = {  # what stands before ∇log π of a token, apart from −A, where nothing is cut
    "gspo": lambda r, mean, total: mean.exp(),
    "cispo": lambda r, mean, total: r,
    "dppo_tv": lambda r, mean, total: r,
    "dppo_kl": lambda r, mean, total: r,
    "vespo": lambda r, mean, total: torch.where(
        ADVANTAGES >= 0,
        total.exp() ** 2 * (3 * (1 - total.exp())).exp(),
        total.exp() ** 3 * (2 * (1 - total.exp())).exp(),
    ),
}


@pytest.mark.parametrize("mode", FACTORS)
def test_gradients_of_losses_with_stopped_gradients_by_hand(mode: str) -> None:
    log_ratio = LOG_PROBS - OLD
    totals = [x.sum().expand(len(x)) for x in log_ratio.split(LENGTHS.tolist())]
    total = torch.cat(totals)
    mean = total / LENGTHS.repeat_interleave(LENGTHS)
    wide = Constants(clip_ratio_low=100.0, clip_ratio_high=100.0, clip_ratio_c=100.0)
    log_probs = LOG_PROBS.clone().requires_grad_()
    losses, _ = token_losses(mode, log_probs, wide, None)
    expected = -ADVANTAGES * FACTORS[mode](log_ratio.exp(), mean, total)
    close(torch.autograd.grad(losses.sum(), log_probs)[0], expected)


def test_constants_of_losses_by_hand() -> None:
    """Two responses of one token with the ratio 2 and advantages of 1 and −1."""
    old, advantages = torch.tensor([0.125, 0.25]).double().log(), torch.tensor([1.0, -1.0]).double()
    now, more = old + np.log(2), {"lengths": torch.tensor([1, 1]), "selected": torch.tensor([1, 0])}

    def losses(mode: str, **constants: float) -> Tensor:
        return POLICY_LOSSES[mode](now, old, advantages, c=Constants(**constants), **more)[0]

    gates = 4 / 2 / (1 + np.exp(-2)), 4 / 3 / (1 + np.exp(-3))
    close(losses("sapo", tau_pos=2, tau_neg=3), [-gates[0], gates[1]])
    close(losses("kl_cov", ppo_kl_coef=0.5), [-2 + 0.5 * np.log(2), 2])
    exponents = {"vespo_k_pos": 1, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2, "vespo_lambda_neg": 1}
    phi = 2 * np.exp(-0.5), 4 * np.exp(-1)
    close(losses("vespo", **exponents), [phi[0] * np.log(4), -phi[1] * np.log(2)])


@pytest.mark.parametrize("weighting", ["seq-mean-token-mean", "seq-mean-token-sum", "delta-l"])
def test_gspo_has_the_gradient_of_the_ratio_of_responses(weighting: str) -> None:
    """Under any weights; with seq-mean-token-sum it is LUSPO, mean_i L_i·min(…)."""
    constants = Constants(clip_ratio_low=0.03, clip_ratio_high=0.05)
    w = response_weights(LENGTHS, weighting, 10, 0.75).double()
    log_probs = LOG_PROBS.clone().requires_grad_()
    parts = zip(log_probs.split(PEER["lengths"]), OLD.split(PEER["lengths"]), strict=True)
    s = torch.stack([(new - old).mean().exp() for new, old in parts])
    a = torch.tensor(PEER["advantages"], dtype=torch.float64)
    of_response = -torch.minimum(s * a, s.clamp(0.97, 1.05) * a)
    expected = (w * LENGTHS * of_response).sum()
    losses, _ = token_losses("gspo", log_probs, constants, None)
    total = (w.repeat_interleave(LENGTHS) * losses).sum()
    close(total, expected)
    grads = [torch.autograd.grad(x, log_probs)[0] for x in (total, expected)]
    close(*grads)


def test_policies_far_apart_give_finite_losses_and_gradients() -> None:
    far = torch.where(torch.arange(26) % 2 == 0, 0.0, -300.0).double()
    for mode in POLICY_LOSSES:
        log_probs = far.clone().requires_grad_()
        more = {"lengths": LENGTHS, "c": Constants(), "selected": torch.ones(26)}
        losses, _ = POLICY_LOSSES[mode](log_probs, far.flip(0), ADVANTAGES, **more)
        assert losses.isfinite().all(), mode
        assert torch.autograd.grad(losses.sum(), log_probs)[0].isfinite().all(), mode


# ------------------------------------------------------------------------------------- selection


def test_selected_tokens_by_hand() -> None:
    """Means 0 and −2: the covariances are 2, −1, −1.5, 0.5, 0, 0."""
    advantages = torch.tensor([2.0, 1, -1, -1, -1, 0], dtype=torch.float64)
    old = torch.tensor([-1, -3, -0.5, -2.5, -2, -3], dtype=torch.float64)
    constants = Constants(kl_cov_ratio=0.4, clip_cov_ratio=0.2, clip_cov_lb=-0.5)
    found = kl_cov_tokens(old, advantages, constants, RANDOM)
    assert found.tolist() == [1, 0, 0, 1, 0, 0]
    drawn = [clip_cov_tokens(old, advantages, constants, RANDOM).tolist() for _ in range(60)]
    assert all(sum(x) == 1 for x in drawn)
    assert {x.index(1) for x in drawn} == {0, 3, 4, 5}
    below = Constants(clip_cov_ratio=1.0, clip_cov_lb=-0.5, clip_cov_ub=1.0)
    assert clip_cov_tokens(old, advantages, below, RANDOM).tolist() == [0, 0, 0, 1, 1, 1]
    none = Constants(clip_cov_lb=3.0)
    assert not clip_cov_tokens(old, advantages, none, RANDOM).any()


def test_tokens_of_low_entropy_by_hand() -> None:
    """The 0.6-quantile of five numbers is 2.4 of the way from the first to the fifth in order."""
    entropies = np.array([0.5, 3.0, 0.1, 1.0, 2.0])  # 1 + 0.4·(2 − 1) = 1.4
    assert low_entropy(entropies, 0.4).tolist() == [True, False, True, True, False]
    assert not low_entropy(entropies, 1.0).any()
    assert low_entropy(entropies, 0.01).sum() == 4
    assert not low_entropy(np.ones(3), 0.1).any()  # all are the largest
    assert len(low_entropy(np.zeros(0), 0.1)) == 0


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_frozen_tokens_have_no_gradient_and_change_no_loss(mode: str) -> None:
    """And of others' gradients only those that depend on them."""
    config = LossConfig(**CASES[mode]["constants"], kl_coef=0.1, kl_type="kl", entropy_coeff=0.1)
    frozen = torch.arange(26) % 3 == 0
    chosen = torch.zeros(26) if selected(mode, config) is None else selected(mode, config)
    results = []
    for marks in (None, frozen.float()):
        log_probs = LOG_PROBS.clone().requires_grad_()
        entropy = torch.ones(26, dtype=torch.float64, requires_grad=True)
        x = LossInputs(log_probs, entropy, LENGTHS, torch.ones(26), torch.ones(26), ADVANTAGES)
        x.old_log_probs, x.ref_log_probs, x.selected, x.frozen = OLD, OLD, chosen, marks
        loss, _ = ppo_loss(x, config)
        loss.backward()
        results.append((loss.detach(), log_probs.grad - 0.1, entropy.grad))  # without the KL term's
    (loss, gradient, of_entropy), (same, left, also) = results
    close(same, loss)
    close(also, of_entropy)
    close(left[frozen], torch.zeros(9))
    close(left[~frozen], gradient[~frozen])


# ------------------------------------------------------------------- any loss with any aggregation

SIZES = [3, 9, 0, 1, 20, 7, 12, 2]
SPLITS = {
    "one": [[i] for i in range(8)],
    "four": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "two ranks": balanced_partitions(SIZES, 2),
    "with an empty one": [[*range(8)], []],
}


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_no_split_changes_the_gradient_of_any_loss_under_any_aggregation(mode: str) -> None:
    config = LossConfig(loss_mode=mode, kl_cov_ratio=0.1, clip_cov_ratio=0.1, clip_cov_lb=0.0)
    samples = make_samples(SIZES)
    old = np.concatenate([s.old_log_probs for s in samples])
    if select := SELECTIONS.get(mode):
        each = torch.tensor(np.repeat([s.advantage for s in samples], SIZES))
        chosen = select(torch.tensor(old), each, config, RANDOM).bool().numpy()
        assert chosen.sum() == 5
        parts = np.split(chosen, np.cumsum(SIZES)[:-1])
        samples = [s.marking("selected", part) for s, part in zip(samples, parts, strict=True)]
    noise = torch.randn(54, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    now = (torch.tensor(old).double() + 0.3 * noise).split(SIZES)
    for weighting in WEIGHTS:
        options = {"max_response_length": 24, "alpha": 0.75, "group_size": 4}
        step = make_step(samples, weighting, **options)

        def gradient(split: list[list[int]], step: Any = step) -> tuple[Tensor, dict[str, Any]]:
            log_probs = [x.clone().requires_grad_() for x in now]
            sums: dict[str, Any] = {}
            for part in split:
                mine = torch.cat([now[0][:0], *(log_probs[i] for i in part)])
                x = loss_inputs(step.share(part), mine, torch.zeros_like(mine))
                loss, found = ppo_loss(x, config)
                loss.backward() if part else None
                for name, value in found.items():
                    if not name.startswith("rollout/"):
                        sums[name] = sums.get(name, 0) + value.detach()
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in log_probs]
            return torch.cat(grads), sums

        expected, expected_sums = gradient([[*range(8)]])
        assert expected.count_nonzero() > 10
        for split in SPLITS.values():
            found, sums = gradient(split)
            assert (found - expected).norm() <= 1e-6 * expected.norm()
            for name, value in expected_sums.items():
                close(sums[name], value, rtol=1e-6)
