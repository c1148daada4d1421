"""Rejection, weights and metrics of rollout correction against numbers worked out by hand, and
those of verl's tests (`tests/trainer/ppo/test_rollout_corr.py` of v0.7.0 and b178a3c)."""

import math

import pytest
import torch

from tests.helpers import close
from verl.algorithms import rollout_correction
from verl.algorithms.rollout_correction import correct, kept_tokens
from verl.config.rollout_correction import OPTIONS, RolloutCorrectionConfig, rejections

LENGTHS = torch.tensor([2, 0, 1])
RATIOS = torch.tensor([2.0, 0.25, 1.1], dtype=torch.float64).log()  # their products: 0.5, 1.1
CASES = [
    ("token", "2.1", None, [1, 0, 1]),
    ("token", "2.1", 0.2, [1, 1, 1]),
    ("token", "0.4_5", None, [1, 0, 1]),  # π_old/π_rollout: 0.25 is too little
    ("token_k1", "0.4_5", None, [1, 1, 1]),  # π_rollout/π_old: 0.5, 4, 0.9
    ("token_k1", "0.6_5", None, [0, 1, 1]),
    ("token_k2", "0.5", None, [1, 0, 1]),  # ln²2/2 = 0.24, ln²4/2 = 0.96, 0.005
    ("token_k3", "0.5", None, [1, 0, 1]),  # 1 − ln 2 = 0.31, ln 4 − 0.75 = 0.64, 0.005
    ("sequence", "1.9", None, [0, 0, 1]),
    ("sequence", "1.9", 0.4, [1, 1, 1]),
    ("sequence", "1.05", 0.4, [1, 1, 0]),
    ("seq_sum_k1", "0.5_1.9", None, [0, 0, 1]),
    ("seq_sum_k1", "0.5_2.1", None, [1, 1, 1]),
    ("seq_sum_k2", "1.3", None, [1, 1, 1]),  # 1.20
    ("seq_sum_k2", "1.1", None, [0, 0, 1]),
    ("seq_sum_k3", "0.95", None, [1, 1, 1]),  # 0.943
    ("seq_sum_k3", "0.94", None, [0, 0, 1]),
    ("geometric", "1.5", None, [1, 1, 1]),  # √0.5 = 0.71
    ("geometric", "1.4", None, [0, 0, 1]),
    ("seq_mean_k1", "0.5_1.4", None, [0, 0, 1]),  # 1/0.71 = 1.41
    ("seq_mean_k1", "0.5_1.5", None, [1, 1, 1]),
    ("seq_mean_k2", "0.61", None, [1, 1, 1]),
    ("seq_mean_k2", "0.59", None, [0, 0, 1]),
    ("seq_mean_k3", "0.48", None, [1, 1, 1]),
    ("seq_mean_k3", "0.46", None, [0, 0, 1]),
    ("seq_max_k2", "0.97", None, [1, 1, 1]),
    ("seq_max_k2", "0.95", None, [0, 0, 1]),
    ("seq_max_k3", "0.64", None, [1, 1, 1]),
    ("seq_max_k3", "0.63", None, [0, 0, 1]),
    ("token_k2, seq_max_k3", "0.5,0.7", None, [1, 0, 1]),
    ("token_k2,seq_max_k3", "0.5,0.1", None, [0, 0, 1]),
    ("token_k2,token_k3", "0.5", None, [1, 0, 1]),
]


def rules(option: str, threshold: str, lower: float | None = None):
    keys = {"rollout_rs": option, "rollout_rs_threshold": threshold}
    return rejections(RolloutCorrectionConfig(**keys, rollout_rs_threshold_lower=lower))


@pytest.mark.parametrize(("option", "threshold", "lower", "expected"), CASES)
def test_rejection_by_hand(option, threshold, lower, expected):
    kept, metrics = kept_tokens(RATIOS, LENGTHS, rules(option, threshold, lower))
    assert kept.tolist() == [bool(x) for x in expected]
    assert metrics["rollout_rs_masked_fraction"] == pytest.approx(1 - sum(expected) / 3)
    touched = (0 in expected[:2]) + (0 in expected[2:])
    assert metrics["rollout_rs_seq_masked_fraction"] == touched / 2  # of two with tokens


def test_every_option_is_tested_and_reports_its_statistic():
    assert {name.strip() for option, *_ in CASES for name in option.split(",")} == OPTIONS
    _, metrics = kept_tokens(RATIOS, LENGTHS, rules("token_k1,seq_max_k2", "0.6_5,0.95"))
    assert metrics["rollout_rs_token_k1_masked_fraction"] == pytest.approx(1 / 3)
    assert metrics["rollout_rs_seq_max_k2_masked_fraction"] == pytest.approx(2 / 3)
    assert metrics["rollout_rs_token_k1_mean"] == pytest.approx(-math.log(0.55) / 3)


@pytest.mark.parametrize("option", ["token", "token_k1"])
def test_verls_mask_mode(option):
    """Ratios of e^−1 and e^0.5: the first response is rejected, and its weights stay."""
    old, rollout = torch.full((10,), -2.0), torch.tensor([-1.0] * 5 + [-2.5] * 5)
    config = RolloutCorrectionConfig("token", 2.0, False, option, "0.5_2.0")
    lengths, both = torch.tensor([5, 5]), torch.tensor([True, True])
    kept, metrics = correct(old.double(), rollout.double(), lengths, both, config)
    assert kept.tolist() == [False] * 5 + [True] * 5
    assert metrics["rollout_rs_masked_fraction"] == 0.5
    close([metrics["rollout_is_min"], metrics["rollout_is_max"]], [0.368, 1.649], rtol=2e-3)


def test_verls_veto():
    """One token with a ratio of e^−15 rejects its response, and no other."""
    log_ratio = torch.tensor([0.0, 0, -15, 0, 0] + [0.0] * 5)
    kept, metrics = kept_tokens(log_ratio, torch.tensor([5, 5]), [], 1e-4)
    assert kept.tolist() == [False] * 5 + [True] * 5
    assert metrics["rollout_is_veto_fraction"] == 0.5
    assert metrics["rollout_is_catastrophic_token_fraction"] == pytest.approx(0.1)
    assert kept_tokens(log_ratio, torch.tensor([5, 5]), [], 1e-7)[0].all()


def test_metrics_by_hand():
    """Under verl's names; of two responses of 1 and 2 tokens with ratios 2; 0.5, 1."""
    ln2 = math.log(2)
    old = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    rollout = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    expected = {
        "training_ppl": 3,
        "training_log_ppl": 1.5 * ln2,
        "kl": 0,
        "k3_kl": 0.5 / 3,
        "rollout_ppl": 2 + math.sqrt(2),
        "rollout_log_ppl": 1.75 * ln2,
        "log_ppl_diff": -0.25 * ln2,
        "log_ppl_abs_diff": 0.75 * ln2,
        "log_ppl_diff_max": 0.5 * ln2,
        "log_ppl_diff_min": -ln2,
        "ppl_ratio": (0.5 + math.sqrt(2)) / 2,
        "chi2_token": 0.75,
        "chi2_seq": 1.125,
    }
    by_level = {
        "token": {
            "mean": 3.5 / 3,
            "ratio_fraction_high": 1 / 3,
            "ratio_fraction_low": 1 / 3,
            "batch_norm_factor": (1.25 + 0.5 + 1) / 3,
            "std": math.sqrt((1.25**2 + 0.8**2 + 1) / 3 - (3.05 / 3) ** 2),
            "eff_sample_size": 3.05**2 / 3 / (1.25**2 + 0.8**2 + 1),
        },
        "sequence": {
            "mean": 1,
            "ratio_fraction_high": 0.5,
            "ratio_fraction_low": 0.5,
            "batch_norm_factor": (1.25 + 0.5) / 2,
            "std": math.sqrt((1.25**2 + 2 * 0.8**2) / 3 - (2.85 / 3) ** 2),
            "eff_sample_size": 2.85**2 / 3 / (1.25**2 + 2 * 0.8**2),
        },
    }
    lengths, all_of_them = torch.tensor([1, 0, 2]), torch.tensor([True] * 3)
    for level, of_weights in by_level.items():
        of_weights |= {"max": 2, "min": 0.5}
        config = RolloutCorrectionConfig(level, 1.25, True)
        _, found = correct(old, rollout, lengths, all_of_them, config)
        named = {f"rollout_is_{name}": value for name, value in of_weights.items()}
        assert found == pytest.approx(expected | named)
    config = RolloutCorrectionConfig("token", 1.25, True)
    _, found = correct(old, rollout, lengths, torch.tensor([True, True, False]), config)
    assert found["rollout_is_batch_norm_factor"] == pytest.approx((1.25 + 1 + 1) / 3)
    nothing = torch.zeros(0, dtype=torch.float64)
    kept, found = correct(nothing, nothing, torch.tensor([0]), torch.tensor([True]), config)
    assert kept.tolist() == [] and found == {}


def test_blocks_of_responses_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of all responses, blocks of two with an empty response among them, and float32."""
    lengths = torch.tensor([3, 0, 1, 4, 0, 2, 5])
    draw = torch.Generator().manual_seed(0)
    old, rollout = -torch.rand(2, int(lengths.sum()), generator=draw)
    weighted, found = torch.ones(len(lengths), dtype=torch.bool), {}
    for block in (256, 2):
        monkeypatch.setattr(rollout_correction, "BLOCK", block)
        kept, found[block] = correct(old, rollout, lengths, weighted, RolloutCorrectionConfig())
        assert kept.all() and len(kept) == 15
    assert found[2] == pytest.approx(found[256], rel=1e-12)
    log_ratio = old.double() - rollout.double()
    sums = torch.stack([part.sum() for part in log_ratio.split(lengths.tolist()) if len(part)])
    assert found[2]["kl"] == pytest.approx(-log_ratio.mean().item())
    assert found[2]["chi2_seq"] == pytest.approx((2 * sums).exp().mean().item() - 1)
