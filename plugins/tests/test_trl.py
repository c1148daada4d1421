"""TRL's gradient with the plug-in is ours, for the completions, rewards and lengths that it had."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PLUGINS, run_in
from verl.algorithms.advantages import advantages
from verl.algorithms.losses import LossConfig
from verl.config.base import FSDPConfig, ModelConfig, OptimConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample
from verl.trainer.ppo.core_algos import response_weights

M, GROUP = 24, 4
NO_DUAL_CLIP = {"clip_ratio_c": 1e9}
SEVERAL = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 5}
# name → options of TRL, and of our loss. All have an alpha, and 8 responses in an optimizer step.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        f"alpha {a}, accumulation {k}": ({"alpha": a, "gradient_accumulation_steps": k}, {})
        for a in (0.0, 0.5, 0.75, 1.0)
        for k in (1, 2, 4)
    },
    # Of 16 responses, in two steps that aren't the policy's own any more; all of it twice.
    "several steps": (SEVERAL, {}),
    "truncated": ({"mask_truncated_completions": True}, {}),
    "tools": ({"tools": True}, {}),
    "tools, truncated": ({"tools": True, "mask_truncated_completions": True}, {}),
    **{name: ({"loss_type": name} | SEVERAL, {}) for name in ("grpo", "bnpo", "dr_grpo", "luspo")},
    "sequence": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo"} | SEVERAL,
        {"loss_mode": "gspo"},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.5} | SEVERAL,
        {"loss_mode": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.5},
    ),
    "sapo": ({"loss_type": "sapo"} | SEVERAL, {"loss_mode": "sapo"}),
    "vespo": ({"loss_type": "vespo"} | SEVERAL, {"loss_mode": "vespo"}),
    "vllm": (
        {"vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
        {"rollout_is": "token", "rollout_is_threshold": 3.0},
    ),
    "kl": ({"beta": 0.1, "use_bias_correction_kl": False} | SEVERAL, {"kl_coef": 0.1}),
}

IN_SHORT = ("alpha 0.75, accumulation 2", "alpha 1.0, accumulation 4", "tools, truncated", "sapo")
if SHORT := "PLUGIN_SHORT" in os.environ:
    CASES = {name: CASES[name] for name in IN_SHORT}


def steps_of(case: str, processes: int) -> dict[str, Any]:
    """TRL's options of a case."""
    options = {"alpha": 0.75, "gradient_accumulation_steps": 2} | CASES[case][0]
    share = 8 // processes // options["gradient_accumulation_steps"]
    return options | {"per_device_train_batch_size": share}


@pytest.fixture(scope="session", params=[2] if SHORT else [1, 2])
def runs(request: pytest.FixtureRequest, model: Path, tmp_path_factory: Any) -> tuple[Path, int]:
    """The folder with the records of all cases, of this number of processes."""
    folder, n = tmp_path_factory.mktemp("trl"), request.param
    cases = {str(zlib.crc32(name.encode())): steps_of(name, n) for name in CASES}
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [PLUGINS / "tests/trl_job.py", model, folder / "cases.json", folder]
    # What `accelerate launch` starts for several processes, but on CPUs that wants MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n] if n > 1 else []
    run_in("trl", launch + arguments, folder / "log")
    return folder, n


@pytest.fixture(scope="session")
def policy(model: Path) -> PolicyWorker:
    """Ours, whose weights are replaced by those that TRL's had before a step."""
    worker = PolicyWorker("cpu")
    worker.build(ModelConfig(path=str(model)), FSDPConfig(), OptimConfig(), 10)
    return worker


def sample(row: dict[str, torch.Tensor], values: torch.Tensor) -> Sample:
    """One of TRL's padded rows; `values`: the advantages of its generation batch."""
    prompt = row["prompt_ids"][row["prompt_mask"].bool()].numpy()
    kept = row["completion_mask"].bool()
    index = int(row["index"])
    group = 1000 * int(row["rollout"]) + index // GROUP
    response = row["completion_ids"][kept].numpy()
    result = Sample(Prompt(index, prompt, "", {}), group, response, "stop")
    result.advantage = float(values[index])
    if "tool_mask" in row:
        result.loss_mask = row["tool_mask"][kept].bool().numpy()
    for ours, theirs in (("old", "old"), ("ref", "ref"), ("rollout", "sampling")):
        if f"{theirs}_per_token_logps" in row:
            of_tokens = row[f"{theirs}_per_token_logps"][kept].numpy()
            setattr(result, f"{ours}_log_probs", of_tokens)
    return result


def our_step(records: list[dict[str, Any]], alpha: float) -> OptimizerStep:
    """The same optimizer step; `records`: one of each process."""
    samples, lengths = [], None
    for record in records:
        for batch in record["micro_batches"]:
            rollout = record["rollouts"][int(batch["rollout"][0])]
            lengths, rewards = rollout["lengths"].numpy(), rollout["rewards"].double()
            groups = torch.arange(len(rewards)) // GROUP
            values = advantages(rewards, groups, lengths, norm_by_std=False)
            for i in range(len(batch["index"])):
                samples.append(sample({k: v[i] for k, v in batch.items()}, torch.as_tensor(values)))
    own = np.array([s.length for s in samples])
    weights = response_weights(own, "delta-l", M, alpha, lengths).numpy()
    # What has no advantage keeps TRL's weights, which are those of alpha 0.
    return OptimizerStep(samples, weights, np.full(len(own), 1 / len(own) / M, np.float32))


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_ours(case: str, runs: tuple[Path, int], policy: PolicyWorker) -> None:
    folder, processes = runs
    name = zlib.crc32(case.encode())
    parts = [torch.load(folder / f"{name}-{i}.pt", weights_only=False) for i in range(processes)]
    options = steps_of(case, processes)
    loss = LossConfig(**(NO_DUAL_CLIP | CASES[case][1]))
    assert len(parts[0]) == options.get("max_steps", 2)
    for records in zip(*parts, strict=True):
        step = our_step(list(records), options["alpha"])
        assert len(step.samples) == 8 and len({s.length for s in step.samples}) > 1
        ours = dict(policy.model.lm.named_parameters())
        for key, value in records[0]["weights"].items():
            ours[key].to_local().data.copy_(value)
        policy.model.zero_grad()
        sums = policy.accumulate_gradient(step, loss, MicroBatchLimit(3))
        theirs = records[0]["gradient"]
        assert theirs.keys() == ours.keys()
        difference = [ours[k].grad.full_tensor() - theirs[k] for k in ours]
        norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
        # All of a step's responses may be clipped, but not while the policy is the old one.
        assert norm > 0.1 or records[0] is not parts[0][0]
        assert torch.cat([d.flatten() for d in difference]).norm() <= 1e-5 * norm
        if not loss.kl_coef:
            assert float(records[0]["loss"]) == pytest.approx(sums["w/pg_loss"], abs=2e-6, rel=5e-5)


def test_cases_are_about_something(runs: tuple[Path, int]) -> None:
    """Tokens of tools, and completions that are cut off, do occur."""
    for case in {"tools", "truncated", "tools, truncated"} & CASES.keys():
        records = torch.load(runs[0] / f"{zlib.crc32(case.encode())}-0.pt", weights_only=False)
        lengths = torch.cat([r["lengths"] for r in records[0]["rollouts"]])
        assert (lengths > 0).any() and (lengths == 0).any() == ("truncated" in case)
        for batch in records[0]["micro_batches"] * ("tools" in case):
            assert (batch["tool_mask"] * batch["completion_mask"]).sum(-1).lt(M).all()
            assert (batch["tool_mask"] < 1).any()
