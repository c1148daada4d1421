"""`adv_estimator=gae` from the driver's side, and end to end."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import make_samples, whole_run
from tests.trainer.test_main_ppo import read, run, settings  # noqa: F401  a fixture
from tests.trainer.test_ray_trainer import LENGTHS, make_trainer
from verl.config.load import ConfigError, compose_config, load_config
from verl.trainer.ppo.metrics import data_metrics

GAE = "algorithm.adv_estimator=gae"
VALUES = "values", "returns"
KL = "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.1"


def test_advantages_of_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """The reward belongs to the last token that counts, each KL term to its own token."""
    trainer = make_trainer(tiny_model, tmp_path, GAE, *KL)
    samples = make_samples(LENGTHS, values=None)
    samples[3].loss_mask = np.arange(10) < 6  # what a tool said comes last
    for s in samples:
        s.values = np.full(len(s.response_ids), 0.5, np.float32)
        s.reward = 1.0
    samples[2].reject(np.arange(5) < 2)  # its other tokens' values would be far off
    samples[2].values[2:] = 40
    trainer.subtract_kl(samples)
    trainer.add_advantages(samples)
    everywhere = np.concatenate([s.trained().advantages() for s in samples])
    assert everywhere.mean() == pytest.approx(0, abs=1e-6)
    assert everywhere.std(ddof=1) == pytest.approx(1, rel=1e-5)
    for s in samples:
        assert s.returns is not None and s.token_advantages is not None
        assert s.old_log_probs is not None and s.ref_log_probs is not None
        kl = s.counted(s.old_log_probs - s.ref_log_probs)
        to_come = 1 - 0.1 * kl[::-1].cumsum()[::-1]  # γ = λ = 1: all that follows
        np.testing.assert_allclose(s.counted(s.returns), to_come, rtol=1e-5)
        assert s.reward == pytest.approx(to_come[0], rel=1e-5)
        assert s.advantage == pytest.approx(s.advantages().mean(), rel=1e-5)
    assert not samples[3].returns[6:].any() and not samples[3].token_advantages[6:].any()
    reported = data_metrics(samples, 100)
    assert reported["critic/values/max"] == 40 and reported["critic/values/min"] == 0.5
    values, returns = (
        np.concatenate([s.counted(getattr(s, name)) for s in samples]) for name in VALUES
    )
    share = 1 - (returns - values).var() / (returns.var() + 1e-5)
    assert reported["critic/vf_explained_var"] == pytest.approx(share, rel=1e-5)


def test_what_a_reward_counts_earlier_is_as_the_keys_say(tiny_model: Path, tmp_path: Path) -> None:
    """γ = 1/2 and λ = 1/4: with values of 0 a return is what comes γ·λ times each token later."""
    keys = "algorithm.gamma=0.5", "algorithm.lam=0.25"
    trainer = make_trainer(tiny_model, tmp_path, GAE, *keys)
    samples = make_samples([3, 1], reward=1.0)
    for s in samples:
        s.values = np.zeros(len(s.response_ids), np.float32)
    trainer.add_advantages(samples)
    np.testing.assert_allclose(samples[0].returns, [1 / 64, 1 / 8, 1])
    samples[0].values[:] = 1  # whose next one is worth γ at once
    trainer.add_advantages(samples)
    np.testing.assert_allclose(samples[0].returns, [0.4375, 0.5, 1])


def test_the_critics_steps_have_its_own_sizes_and_the_actors_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    sizes = ["critic.ppo_mini_batch_size=4", "critic.ppo_epochs=3"]
    trainer = make_trainer(tiny_model, tmp_path, GAE, "algorithm.use_grpopp=True", *sizes)
    samples = make_samples(LENGTHS)
    steps = trainer.optimizer_steps(samples, of_critic=True)
    assert [len(step.samples) for step in steps] == [8, 8, 8]
    lengths = np.array(LENGTHS)
    expected = lengths**-0.75 / (8 * 10) / (lengths**-0.75).mean()
    np.testing.assert_allclose(steps[2].weights, expected, rtol=1e-6)
    assert [len(step.samples) for step in trainer.optimizer_steps(samples)] == [4, 4]
    trainer = make_trainer(tiny_model, tmp_path, GAE, *sizes, "critic.shuffle=True")
    orders = [
        [s.group for s in step.samples] for step in trainer.optimizer_steps(samples, of_critic=True)
    ]
    assert all(sorted(order) == [0, 0, 1, 1, 2, 2, 3, 3] for order in orders)
    assert any(order != sorted(order) for order in orders)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("critic.ppo_mini_batch_size=3", "critic.ppo_mini_batch_size=3 must divide"),
        ("critic.ulysses_sequence_parallel_size=3", "must divide the 2 ranks"),
        ("critic.ppo_max_token_len_per_gpu=9", "can't hold one sequence of 1024 tokens"),
        ("critic.use_dynamic_bsz=False", "set critic.ppo_micro_batch_size_per_gpu, or drop it"),
        ("critic.loss_agg_mode=token-mean", "has the weights of the actor's"),
        ("algorithm.lam=1.1", "algorithm.lam=1.1: must be at most 1"),
        ("critic.optim.betas=[1]", "critic.optim.betas=[1.0]: give two numbers"),
    ],
)
def test_what_cannot_be_is_one_line(override: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config([GAE, "trainer.n_gpus_per_node=2", "trainer.device=cpu", override])
    lines = str(error.value).splitlines()
    assert any(text in line for line in lines) and len(lines) <= 2


def test_what_a_critic_cannot_have_is_no_matter_without_one(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = ["critic.model.lora_rank=32", "critic.megatron.x=1", "critic.strategy=megatron"]
    others += ["critic.optim.lr=0", "critic.unknown=1"]
    load_config(others)
    assert caplog.text.count("critic.megatron.x (there is no critic)") == 1
    with pytest.raises(ConfigError) as error:
        compose_config([GAE, *others])
    assert len(str(error.value).splitlines()) == 5
    with pytest.raises(ValueError, match=r"critic_warmup=9: the actor would rest in all 3 steps"):
        steps = "trainer.total_training_steps=3"
        make_trainer(tiny_model, tmp_path, GAE, "trainer.critic_warmup=9", steps)


@whole_run
def test_a_run_with_a_critic_learns_and_resumes_exactly(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The actor rests in the first step; a run that resumes in the middle ends with the same
    numbers as the one that didn't stop."""
    options = [GAE, "trainer.critic_warmup=2", "critic.optim.lr=1e-3", "algorithm.lam=0.95"]
    options += ["actor_rollout_ref.actor.use_kl_loss=False", "algorithm.use_kl_in_reward=True"]
    options += ["trainer.save_hf_model=False", "trainer.test_freq=-1"]
    options += ["trainer.val_before_train=False"]
    offload = ("param_offload", "optimizer_offload")
    options += [f"critic.model.fsdp_config.{name}=True" for name in offload]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(settings, *options, f"trainer.default_local_dir={whole}")
    steps = read(whole)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert "actor/pg_loss" not in steps[0] and steps[0]["critic/vf_loss"] > 0
    assert steps[1]["actor/grad_norm"] > 0 and steps[1]["critic/lr"] == 1e-3
    assert steps[0]["critic/values/max"] == 0 != steps[1]["critic/values/max"]
    assert steps[3]["critic/score/mean"] > steps[0]["critic/score/mean"]
    path = f"trainer.resume_from_path={whole}/global_step_2"
    more = ["trainer.resume_mode=resume_path", path, f"trainer.default_local_dir={resumed}"]
    run(settings, *options, *more)
    again = read(resumed)
    for old, new in zip(steps[2:], again, strict=True):
        assert old.keys() == new.keys()
        for name in old:
            if not name.startswith(("timing", "perf")):
                assert old[name] == new[name], name
