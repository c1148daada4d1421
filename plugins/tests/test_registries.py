"""verl's and SkyRL's own advantages and losses with the plug-in give our loss and gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLUGINS, run_in
from verl.algorithms.advantages import advantages
from verl.algorithms.policy_losses import POLICY_LOSSES, Constants
from verl.trainer.ppo.core_algos import response_weights

LENGTHS, M = [3, 9, 5, 1, 20, 7, 12, 2, 0, 17, 4, 11], 20
ALPHAS = [0.0, 0.5, 0.75, 1.0]


def padded() -> dict[str, Any]:
    """A rollout batch, in groups of four and two optimizer steps; some tokens are a tool's."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(24) < torch.tensor(LENGTHS)[:, None]).long()
    mask = torch.cat([torch.zeros_like(mask[:, :2]), mask], 1)  # [12, 26]: a tool's come first
    old = torch.rand(mask.shape, generator=draw) * -3 - 0.1
    return {
        "mask": mask,
        "old_log_probs": old,
        "log_probs": old + 0.4 * torch.randn(mask.shape, generator=draw),
        "rewards": torch.rand(len(mask), generator=draw),
        "groups": torch.arange(len(mask)) // 4,
        "steps": torch.randperm(len(mask), generator=draw).split(6),
    }


def ours(
    batch: dict[str, Any],
    alpha: float,
    estimator: str = "grpo",
    norm_by_std: bool = True,
    loss_mode: str = "vanilla",
    **constants: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and gradient in the log-probabilities, summed over optimizer steps."""
    mask, lengths = batch["mask"].bool(), batch["mask"].sum(1)
    values = advantages(batch["rewards"], batch["groups"], lengths, estimator, norm_by_std)
    log_probs = batch["log_probs"].clone().requires_grad_()
    total = torch.zeros(())
    for step in batch["steps"]:
        L = lengths[step]
        weights = response_weights(L, "delta-l", M, alpha, lengths).repeat_interleave(L)
        of_tokens = [x[step][mask[step]] for x in (log_probs, batch["old_log_probs"])]
        A = values[step].float().repeat_interleave(L)
        c = Constants(loss_mode=loss_mode, **constants)
        loss, _ = POLICY_LOSSES[loss_mode](*of_tokens, A, lengths=L, c=c)
        total = total + (weights * loss).sum()
    (gradient,) = torch.autograd.grad(total, log_probs)
    return total.detach(), gradient


def assert_same(theirs: dict[str, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    loss, gradient = expected
    torch.testing.assert_close(theirs["loss"], loss, rtol=1e-5, atol=1e-7)
    assert gradient.norm() > 1e-3
    assert (theirs["gradient"] - gradient).norm() < 1e-5 * gradient.norm()


MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
# name → overrides, and what `ours` is given
VERL: dict[str, tuple[list[str], dict[str, Any]]] = {
    **{f"alpha {a}": ([f"+algorithm.delta_l.alpha={a}"], {"alpha": a}) for a in ALPHAS},
    "default": ([], {}),
    "std": (["algorithm.norm_adv_by_std_in_grpo=False"], {"norm_by_std": False}),
    "rloo": (["+algorithm.delta_l.base=rloo"], {"estimator": "rloo"}),
    "gspo": ([f"{MODE}=gspo"], {"loss_mode": "gspo"}),
    "gpg": ([f"{MODE}=gpg"], {"loss_mode": "gpg"}),
    "cispo": ([f"{MODE}=cispo"], {"loss_mode": "cispo"}),
    "dppo": ([f"{MODE}=dppo_tv"], {"loss_mode": "dppo_tv"}),
}


@pytest.fixture(scope="module")
def verl_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What verl computes, of all cases with several ranks and micro-batches."""
    folder = tmp_path_factory.mktemp("verl")
    cases = {}
    for i, (name, (overrides, _)) in enumerate(VERL.items()):
        overrides = [*overrides, f"data.max_response_length={M}"]
        cases[name] = {"overrides": overrides, "ranks": 1 + i % 2, "micro_batch": 1 + i % 4}
    torch.save((padded(), cases), folder / "in.pt")
    job = PLUGINS / "tests/verl_job.py"
    run_in("verl", [job, folder / "in.pt", folder / "out.pt"], folder / "log")
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("case", VERL)
def test_verl(case: str, verl_results: dict[str, Any]) -> None:
    assert_same(verl_results[case], ours(padded(), **({"alpha": 0.75} | VERL[case][1])))


def test_verl_finds_the_plug_in(verl_results: dict[str, Any]) -> None:
    """In the driver, which ran the cases, and in workers of Ray; and it is verl itself."""
    assert verl_results["worker"] and verl_results["verl"].startswith("0.9.1")


def test_skyrl(tmp_path: Path) -> None:
    torch.save((padded(), ALPHAS, M), tmp_path / "in.pt")
    arguments = [PLUGINS / "tests/skyrl_job.py", tmp_path / "in.pt", tmp_path / "out.pt"]
    run_in("verl", arguments, tmp_path / "log")
    results = torch.load(tmp_path / "out.pt")
    for alpha in ALPHAS:
        assert_same(results[alpha], ours(padded(), alpha, clip_ratio_c=1e9))
    assert results["worker"]
