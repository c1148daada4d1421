"""Functions of the user's: what they are given, where they run, and what is refused."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, close, make_samples, warm_children, warm_python
from verl.algorithms.advantages import ADVANTAGES, advantages
from verl.algorithms.losses import ppo_loss
from verl.algorithms.policy_losses import POLICY_LOSSES
from verl.algorithms.weights import WEIGHTS, response_weights
from verl.config.load import ConfigError, load_config
from verl.config.schema import Config
from verl.config.validate import changed_keys, ignored_keys
from verl.models.packing import loss_inputs
from verl.models.policy import PolicyWorker
from verl.protocol import OptimizerStep
from verl.trainer.ppo.workers import loss_config
from verl.utils import own_functions

ACTOR = "actor_rollout_ref.actor."
KEYS = {
    "weights": own_functions.WEIGHT,
    "advantages": own_functions.ADVANTAGE,
    "loss": own_functions.LOSS,
}
GOOD = """
import torch
from dataclasses import dataclass

@dataclass
class Scale:
    by: "float" = 2.0

def weights(lengths, *, max_response_length, groups):
    return Scale().by * groups / (lengths * max_response_length)

def advantages(rewards, groups, lengths):
    return rewards - groups + lengths

def loss(inputs, config):
    ratio = (inputs.log_probs - inputs.old_log_probs).exp()
    bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return torch.maximum(-inputs.advantages * ratio, -inputs.advantages * bounded)

def reported(inputs):
    return inputs.log_probs * inputs.entropy, {"entropy_twice": 2 * inputs.entropy}
"""


def config_with(path: Path, code: str = GOOD, *more: str, **functions: str) -> Config:
    """`functions`: kinds, and the names in the file `path` with this code."""
    path.write_text(code)
    own = [f"{KEYS[kind]}={path}:{name}" for kind, name in functions.items()]
    return load_config(
        [*own, "data.max_response_length=10", "actor_rollout_ref.rollout.n=4", *more]
    )


def check(config: Config) -> None:
    own_functions.check(config, loss_config(config))


def test_weights_get_what_they_take_and_only_responses_with_tokens(tmp_path: Path) -> None:
    config = config_with(tmp_path / "own.py", weights="weights")
    check(config)
    mode = config.actor_rollout_ref.actor.loss_agg_mode
    found = response_weights([2, 0, 4, 5], mode, 10, groups=[0, 1, 1, 2])
    close(found, [0, 0, 2 / 40, 4 / 50])
    assert response_weights([0, 0], mode, 10).tolist() == [0, 0]


@pytest.mark.parametrize("function", ["weights", "negative", "absent"])
def test_a_dry_run_tries_them(function: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(GOOD + "\ndef negative(lengths):\n    return -lengths\n")
    override = f"{KEYS['weights']}={path}:{function}"
    done = subprocess.run(
        [warm_python(), "-m", "verl.trainer.main_ppo", override],
        env=os.environ | warm_children() | {"DRY_RUN": "quiet"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if function == "weights":
        assert (done.returncode, done.stderr) == (0, "") and override.partition("=")[
            2
        ] in done.stdout
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {override}") and done.stderr.count("\n") == 1


def test_advantages_get_what_they_take(tmp_path: Path) -> None:
    config = config_with(tmp_path / "own.py", advantages="advantages")
    check(config)
    found = advantages([1.0, 0.0], [3, 4], [7, 9], config.algorithm.adv_estimator)
    assert found.tolist() == [1 - 3 + 7, -4 + 9]
    alone = f"{KEYS['advantages']}={tmp_path}/own.py:advantages", "actor_rollout_ref.rollout.n=1"
    check(load_config(alone))  # it may compare with nothing


def test_a_loss_is_weighed_like_the_others(tmp_path: Path) -> None:
    """The same as `vanilla`, where that has no dual clip; with what it reports."""
    samples = make_samples([3, 5, 1])
    step = OptimizerStep(samples, np.array([0.1, 0.2, 0.3], np.float32))
    results = []
    for function in ("loss", "reported"):
        config = config_with(tmp_path / "own.py", loss=function)
        check(config)
        own = loss_config(config)
        for loss in (own, loss_config(load_config(["actor_rollout_ref.actor.clip_ratio_c=1e9"]))):
            now = torch.linspace(-5, -4, 9).requires_grad_()
            value, sums = ppo_loss(loss_inputs(step, now, torch.full((9,), 0.5)), loss)
            value.backward()
            results.append((value.detach(), now.grad, sums))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    close(results[0][2]["ppo_kl"], results[1][2]["ppo_kl"])
    close(results[2][2]["entropy_twice"], 9.0)


def test_a_worker_needs_the_text_alone(tmp_path: Path) -> None:
    config = config_with(tmp_path / "own.py", loss="loss")
    name, source = own_functions.sources(config)[KEYS["loss"]]
    (tmp_path / "own.py").unlink()
    PolicyWorker.define_loss(None, name, source)  # type: ignore[arg-type]
    assert name in POLICY_LOSSES


@pytest.mark.parametrize(
    ("kind", "code", "problem"),
    [
        ("weights", "def weights(sizes): return 1 / sizes", "missing a required argument: 'sizes'"),
        ("weights", "def other(lengths): return lengths", "own.py has no function weights"),
        ("weights", "def weights(lengths)\n", "line 1: SyntaxError: expected ':'"),
        ("weights", "\nimport no_such_thing\n", "line 2: ModuleNotFoundError: No module named"),
        ("weights", "def weights(lengths):\n return lengths[0]", "returned [], not a tensor of"),
        ("weights", "def weights(lengths): return [1.0] * len(lengths)", "returned list, not a"),
        ("weights", "def weights(lengths): return 1 - lengths", "must be finite, and not negative"),
        ("weights", "def weights(lengths): return 0 * lengths", "returned nothing but zeros"),
        ("weights", "def weights(lengths):\n return lengths + x", "line 2: NameError: name 'x'"),
        ("advantages", "def advantages(rewards): return rewards[:3]", "not a tensor of shape [12]"),
        ("advantages", "def advantages(rewards): return rewards.log()", "returned -inf for"),
        (
            "advantages",  # no response to the first prompt is better than the others
            "def advantages(rewards, groups):\n"
            " z = rewards.clone()\n"
            " for g in set(groups.tolist()):\n"
            "  r = rewards[groups == g]\n"
            "  z[groups == g] = (r - r.mean()) / r.std()\n"
            " return z",
            "returned nan for response 0: must be finite",
        ),
        ("loss", "def loss(inputs, config): return inputs.advantages.sum()", "returned [], not a"),
        ("loss", "def loss(inputs): return inputs.advantages", "has no gradient"),
        (
            "loss",
            "def loss(inputs): return inputs.log_probs - inputs.log_probs.mean()",
            "on others",
        ),
        ("loss", "def loss(inputs): return inputs.log_probs * inputs.ref_log_probs", "TypeError"),
        (
            "loss",
            "def loss(inputs):\n x = inputs.log_probs\n return (x - x).sqrt()",
            "its gradient",
        ),
    ],
)
def test_what_can_not_be_right_is_refused_at_start(
    tmp_path: Path, kind: str, code: str, problem: str
) -> None:
    config = config_with(tmp_path / "own.py", code, **{kind: kind})
    with pytest.raises(ValueError) as refused:
        check(config)
    assert str(refused.value).startswith(f"{KEYS[kind]}={tmp_path}/own.py:{kind}")
    assert problem in str(refused.value)


def test_a_loss_may_take_the_reference_if_there_is_one(tmp_path: Path) -> None:
    code = "def loss(inputs): return inputs.log_probs * inputs.ref_log_probs"
    check(config_with(tmp_path / "own.py", code, f"{ACTOR}use_kl_loss=True", loss="loss"))


def test_names_and_files(tmp_path: Path) -> None:
    for value, problem in (
        (f"{tmp_path}/no.py:weights", f"there is no file {tmp_path}/no.py"),
        ("sqrt", r"choose from token-mean, .*, or path/to/file\.py:function"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_config([f"{KEYS['weights']}={value}"])
    one = [f"{ACTOR}clip_ratio_c=4", "algorithm.grpopp_config.alpha=0.5"]
    config = config_with(tmp_path / "own.py", GOOD, *one, weights="weights", loss="loss")
    # Which a function may read: nobody can say that they have no effect.
    keys = [f"{ACTOR}clip_ratio_c", "algorithm.grpopp_config.alpha"]
    assert ignored_keys(config, keys) == {}
    assert [*ignored_keys(load_config(one), keys)] == keys[1:]
    with pytest.raises(ConfigError, match=r"use_grpopp=True chooses the loss aggregation"):
        load_config([f"{KEYS['weights']}={tmp_path}/own.py:weights", "algorithm.use_grpopp=True"])


def test_a_changed_text_is_another_training(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    config = config_with(path, weights="weights", loss="loss")
    saved: dict[str, Any] = {"algorithm": {"own_functions": config.algorithm.own_functions}}
    assert changed_keys(saved, config_with(path, weights="weights", loss="loss")) == {}
    other = config_with(path, GOOD + "\n", weights="weights", loss="loss")
    (problem,) = changed_keys(saved, other)["error"]
    assert problem.startswith("algorithm.own_functions: ") and problem.count("own.py:loss@") == 2
    # What ran when the process started goes on, whatever becomes of the file.
    text = own_functions.sources(other)
    path.write_text("")
    assert own_functions.sources(other) == text
    with pytest.raises(ValueError, match="knows another text: start again"):
        own_functions.sources(config)


def test_the_dictionaries_are_those_of_the_keys() -> None:
    tables = [table for table, _, _ in own_functions.KINDS.values()]
    assert all(a is b for a, b in zip(tables, (WEIGHTS, ADVANTAGES, POLICY_LOSSES), strict=True))
