"""The gradient is one sum over responses: no split of the work may change it."""

import itertools
import json
import os
import pickle
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from transformers import AutoModelForCausalLM

from tests.helpers import free_address, make_samples, make_step, make_tiny_model
from tests.models.families import FAMILIES
from verl.algorithms.losses import LossConfig
from verl.config.base import FSDPConfig, MixedPrecisionConfig, ModelConfig, OptimConfig
from verl.models.packing import over_ranks
from verl.models.policy import HostMemory, MicroBatchLimit, PolicyWorker, learning_rate_factor
from verl.protocol import OptimizerStep, Sample
from verl.trainer.ppo.core_algos import (
    POLICY_LOSSES,
    WEIGHTS,
    kl_divergence,
    policy_loss,
    response_weights,
)
from verl.trainer.ppo.metrics import update_metrics
from verl.utils.seqlen_balancing import balanced_partitions, partitions_of_prompts

LENGTHS = [3, 9, 0, 1, 20, 7, 12, 2]
M = 24
LIMITS = {
    "one": MicroBatchLimit(1),
    "four": MicroBatchLimit(4),
    "all": MicroBatchLimit(len(LENGTHS)),
    "tokens": MicroBatchLimit(None, 40),
}
PAIRS = [*itertools.product((*POLICY_LOSSES, "frozen"), WEIGHTS)]
"""Every policy loss, and one without a gradient at some tokens, with every aggregation."""
LOSS = LossConfig(entropy_coeff=0.05, kl_coef=0.1, clip_ratio_high=0.3, temperature=0.9)


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights: float32 rounding stays well below what is compared."""
    return make_tiny_model(tmp_path_factory.mktemp("actor"), initializer_range=0.02)


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> PolicyWorker:
    return build(tiny_model)


def build(
    folder: Path, remove_padding: bool = True, fsdp: FSDPConfig | None = None, **model: object
) -> PolicyWorker:
    worker = PolicyWorker("cpu")
    config = ModelConfig(path=str(folder), use_remove_padding=remove_padding, **model)
    worker.build(config, fsdp or FSDPConfig(), OptimConfig(lr=1e-3), 10)
    return worker


def weighted_step(mode: str, samples: list[Sample] | None = None) -> OptimizerStep:
    """Under dr-grpo KL loss and entropy bonus have other weights, those of token-mean."""
    options = {"max_response_length": M, "alpha": 0.75, "group_size": 4}
    step = make_step(samples or make_samples(LENGTHS), mode, **options)
    if mode == "dr-grpo":
        step.regularizer_weights = make_step(step.samples).weights
    return step


def pair(mode: str, weighting: str) -> tuple[OptimizerStep, LossConfig]:
    """Of `PAIRS`; with every third token marked."""
    step, frozen = weighted_step(weighting), mode == "frozen"
    name = "frozen" if frozen else "selected"
    step.samples = [s.marking(name, np.arange(s.length) % 3 == 0) for s in step.samples]
    return step, replace(LOSS, loss_mode="vanilla" if frozen else mode)


def turn(mode: str, weighting: str) -> tuple[bool, str]:
    """Padding and micro-batches, such that each loss and each aggregation has all of them."""
    i, j = [*POLICY_LOSSES, "frozen"].index(mode), [*WEIGHTS].index(weighting)
    return (i + j) % 2 == 0, [*LIMITS][(i // 2 + j // 2) % 4]


def constant_step(samples: list[Sample], weight: float) -> OptimizerStep:
    return OptimizerStep(samples, np.full(len(samples), weight, np.float32))


def gradient(
    policy: PolicyWorker, step: OptimizerStep, limit: MicroBatchLimit, loss: LossConfig = LOSS
) -> torch.Tensor:
    """Flat gradient of the loss over all ranks' samples."""
    return gradient_and_sums(policy, step, limit, loss)[0]


def gradient_and_sums(
    policy: PolicyWorker, step: OptimizerStep, limit: MicroBatchLimit, loss: LossConfig = LOSS
) -> tuple[torch.Tensor, dict[str, float]]:
    """And what this rank reports."""
    policy.model.zero_grad()
    sums = policy.accumulate_gradient(step, loss, limit)
    return torch.cat(
        [p.grad.full_tensor().flatten() for p in policy.model.parameters() if p.requires_grad]
    ), sums


def log_probs_of(
    worker: PolicyWorker, samples: list[Sample], temperature: float, limit: MicroBatchLimit
) -> list[np.ndarray]:
    """One array for each sample."""
    ends = np.cumsum([len(s.response_ids) for s in samples])
    return np.split(worker.log_probs(samples, temperature, limit), ends)[:-1]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def reference_loss(folder: Path, step: OptimizerStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and flat gradient, written out response by response in float64 on the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    other_weights = step.weights if step.regularizer_weights is None else step.regularizer_weights
    for s, weight, other in zip(step.samples, step.weights, other_weights, strict=True):
        ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
        start = len(s.prompt.token_ids) - 1
        logits = model(ids).logits[0, start : start + len(s.response_ids)] / LOSS.temperature
        log_p = logits.log_softmax(-1)
        taken = log_p.gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
        old, ref = (torch.tensor(x).double() for x in (s.old_log_probs, s.ref_log_probs))
        advantage = torch.full_like(taken, s.advantage)
        token_loss, _ = policy_loss(taken, old, advantage, 0.2, 0.3, 3.0)
        regularizer = 0.05 * (log_p.exp() * log_p).sum(-1)  # minus the entropy
        regularizer = regularizer + 0.1 * kl_divergence(taken, ref, "low_var_kl")
        mask = torch.tensor(np.ones(len(taken), bool) if s.loss_mask is None else s.loss_mask)
        loss = loss + float(weight) * token_loss[mask].sum()
        loss = loss + float(other) * regularizer[mask].sum()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]).float()


@pytest.mark.parametrize("mode", WEIGHTS)
def test_gradient_is_that_of_the_formula(mode: str, worker: PolicyWorker, tiny_model: Path) -> None:
    step = weighted_step(mode)
    _, expected = reference_loss(tiny_model, step)
    # float32 against float64
    assert distance(gradient(worker, step, LIMITS["four"]), expected) < 1e-5


@pytest.mark.parametrize("mode", WEIGHTS)
def test_tokens_that_the_loss_mask_leaves_out_have_no_part_in_anything(
    mode: str, worker: PolicyWorker, tiny_model: Path
) -> None:
    """They are read as context, and that is all: weights and losses know the other tokens alone,
    whatever stands in the masked tokens' log-probabilities."""
    rng = np.random.default_rng(0)
    samples = make_samples(LENGTHS)
    for s in samples[1:]:
        s.loss_mask = rng.random(len(s.response_ids)) < 0.6
    samples[3].loss_mask[:] = False
    step = weighted_step(mode, samples)
    counted = [int(s.loss_mask.sum()) for s in samples[1:]]
    weights = response_weights([LENGTHS[0], *counted], mode, M, 0.75, group_size=4)
    np.testing.assert_array_equal(step.weights, weights)
    expected = reference_loss(tiny_model, step)[1]
    found = [gradient(worker, step, limit) for limit in LIMITS.values()]
    assert all(distance(g, expected) < 1e-5 for g in found)
    sums = worker.accumulate_gradient(step, LOSS, LIMITS["four"])
    assert sums["tokens"] == LENGTHS[0] + sum(counted)
    for s in samples[1:]:
        for values in (s.old_log_probs, s.ref_log_probs, s.rollout_log_probs):
            values[~s.loss_mask] = np.nan
    assert torch.equal(gradient(worker, step, LIMITS["all"]), found[2])
    for s, log_probs in zip(
        samples, log_probs_of(worker, samples, 0.9, LIMITS["four"]), strict=True
    ):
        assert len(log_probs) == len(s.response_ids)
        if s.loss_mask is not None:
            assert not log_probs[~s.loss_mask].any() and log_probs[s.loss_mask].all()


@pytest.mark.parametrize("mode", WEIGHTS)
def test_micro_batches_do_not_change_the_gradient(mode: str, worker: PolicyWorker) -> None:
    step = weighted_step(mode)
    expected = gradient(worker, step, LIMITS["all"])
    for limit in LIMITS.values():
        assert distance(gradient(worker, step, limit), expected) < 1e-6


def test_padding_and_checkpointing_do_not_change_the_gradient(
    worker: PolicyWorker, tiny_model: Path
) -> None:
    step = weighted_step("delta-l")
    expected = gradient(worker, step, LIMITS["all"])
    for remove_padding, recompute in itertools.product((True, False), repeat=2):
        other = build(tiny_model, remove_padding, enable_gradient_checkpointing=recompute)
        for limit in LIMITS.values():
            assert distance(gradient(other, step, limit), expected) < 1e-6


def prompts_shared() -> list[Sample]:
    """Three prompts; responses longer and shorter than them, one masked, in no order."""
    samples = make_samples(LENGTHS, prompt_length=8)
    for i, s in enumerate(samples):
        s.prompt = samples[i % 3].prompt
    samples[4].loss_mask = np.arange(LENGTHS[4]) % 3 > 0
    return samples


def without_sharing(policy: PolicyWorker) -> PolicyWorker:
    other = copy(policy)
    other.shares, other.pack = False, partial(policy.pack, share=False)
    return other


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3", {"enable_gradient_checkpointing": False}),
        ("Qwen3", {"lora_rank": 4}),
        ("Mistral", {}),  # windows
        ("Gemma 2", {}),  # windows and caps
        ("GPT-OSS", {}),  # windows, sinks and experts
    ],
)
def test_a_prompt_is_computed_once_for_its_responses(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """And nothing else changes, however they are split."""
    kind, overrides = FAMILIES[family]
    folder = make_tiny_model(tmp_path, kind, **overrides, initializer_range=0.02)
    policy = build(folder, **settings)
    plain, samples = without_sharing(policy), prompts_shared()
    step = weighted_step("delta-l", samples)
    for limit in LIMITS.values():
        expected, found = (gradient_and_sums(w, step, limit) for w in (plain, policy))
        assert distance(found[0], expected[0]) < 1e-6
        assert found[1] == pytest.approx(expected[1], rel=1e-6, abs=1e-6)
        rows = [w.log_probs(samples, 0.9, limit, True) for w in (plain, policy)]
        np.testing.assert_allclose(*rows, rtol=1e-6, atol=2e-6)
    found = [w.pack(samples).input_ids.numel() for w in (plain, policy)]
    prompts, rest = [len(s.prompt.token_ids) for s in samples], sum(LENGTHS) - len(LENGTHS)
    assert found == [sum(prompts) + rest, sum(prompts[:3]) + rest + 1]  # 1: no response
    for parts in (w.micro_batches(samples, LIMITS["tokens"]) for w in (plain, policy)):
        assert sorted(itertools.chain(*parts)) == [*range(len(samples))]


def test_a_prompt_that_is_not_to_be_shared_is_not(worker: PolicyWorker, tiny_model: Path) -> None:
    policy, samples = PolicyWorker("cpu"), prompts_shared()  # in the process group of `worker`
    policy.build(ModelConfig(path=str(tiny_model)), FSDPConfig(), share_prompts=False)
    assert worker.shares and not policy.shares
    tokens = [w.pack(samples).input_ids.numel() for w in (worker, without_sharing(worker), policy)]
    assert tokens[0] < tokens[1] == tokens[2]


def _rank_shared(rank: int, address: str, folder: Path, out: Path) -> None:
    """One of two: responses of a prompt on both, and on one each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    policy, step = build(folder), weighted_step("delta-l", prompts_shared())
    samples, results = step.samples, {}
    for split in (partitions_of_prompts, lambda samples, _: [[0, 1, 4, 5], [2, 3, 6, 7]]):
        mine = step.share(split(samples, 2)[rank])
        for name, limit in LIMITS.items():
            results[f"{split.__name__} {name}"] = gradient(policy, mine, limit)
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in `_rank_gradients`


def test_a_prompt_on_two_ranks(worker: PolicyWorker, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "gradients.pt"
    mp.spawn(_rank_shared, (free_address(), tiny_model, out), nprocs=2)
    step = weighted_step("delta-l", prompts_shared())
    expected = gradient(without_sharing(worker), step, LIMITS["all"])
    results = torch.load(out, weights_only=True)
    assert len(results) == 2 * len(LIMITS)
    for name, found in results.items():
        assert distance(found, expected) < 1e-6, name


def test_inputs_of_layers_are_what_is_offloaded(tiny_model: Path) -> None:
    """The same gradient, bit by bit. On a CPU torch's hooks copy nothing: it is noted here which
    tensors pass through them, and from them a copy comes back."""
    step, plain = weighted_step("delta-l"), build(tiny_model)
    expected = gradient(plain, step, LIMITS["all"])
    worker = build(tiny_model, enable_activation_offload=True)
    hooks, packed, inputs = worker.model.saving(), [], []
    assert isinstance(hooks, torch.autograd.graph.save_on_cpu)
    assert not isinstance(plain.model.saving(), torch.autograd.graph.save_on_cpu)

    def pack(tensor: torch.Tensor) -> object:
        packed.append(tensor.data_ptr())
        return hooks.pack_hook(tensor.clone())

    worker.model.saving = lambda: torch.autograd.graph.saved_tensors_hooks(pack, hooks.unpack_hook)
    decoder = worker.model.lm.get_decoder()
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].data_ptr()))
    assert torch.equal(gradient(worker, step, LIMITS["all"]), expected)
    first, again = inputs[:2], inputs[:1:-1]  # the backward pass begins with the last layer
    assert len(again) == 2 and {*first} <= {*packed} and not {*again} & {*first}
    assert len(packed) < 12  # token ids and what the final norm needs beside them


def test_parameters_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    """And with them AdamW's states; passes compute as they are told, and the reference has a type
    of its own."""
    half, whole = FSDPConfig(model_dtype="bfloat16"), FSDPConfig()
    worker = PolicyWorker("cpu")
    model = ModelConfig(path=str(tiny_model))
    worker.build(model, half, OptimConfig(lr=1e-2), 10)
    worker.build_beside("ref", model, whole)
    step = weighted_step("delta-l")
    before = [p.full_tensor().clone() for p in worker.model.parameters()]
    exact = worker.ref_log_probs(step.samples, 1.0, LIMITS["all"])
    rounded = worker.log_probs(step.samples, 1.0, LIMITS["all"])
    assert 0 < np.abs(exact - rounded).max() < 0.05  # only the parameters are rounded
    assert worker.update([step], LOSS, LIMITS["four"], 1.0)[0]["skipped"] == 0
    for old, p in zip(before, worker.model.parameters(), strict=True):
        state = worker.optimizers[0].state[p]
        types = {p.dtype, old.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype}
        assert types == {torch.bfloat16}
        assert not torch.equal(old, p.full_tensor())
    assert {p.dtype for p in worker.beside["ref"].model.parameters()} == {torch.float32}
    worker.save(tmp_path / "actor")
    again = build(tiny_model, fsdp=half)
    again.load(tmp_path / "actor")
    expected = worker.log_probs(step.samples, 1.0, LIMITS["all"])
    np.testing.assert_array_equal(again.log_probs(step.samples, 1.0, LIMITS["all"]), expected)


def test_kernels_that_repeat_are_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
    for name in names:
        monkeypatch.setenv(name, "")  # so that they are as before in the end
        monkeypatch.delenv(name)
    build(tiny_model)
    assert not torch.are_deterministic_algorithms_enabled() and not {*names} & os.environ.keys()
    try:
        build(tiny_model, fsdp=FSDPConfig(full_determinism=True))
        assert torch.are_deterministic_algorithms_enabled() and {*names} <= os.environ.keys()
    finally:
        torch.use_deterministic_algorithms(False)


def test_epsilon_of_the_optimizer(tiny_model: Path) -> None:
    """AdamW's first step is lr·g / (|g| + ε): a large ε makes it small."""
    moved = []
    for eps in (1e-8, 1e3):
        worker = PolicyWorker("cpu")
        optim = OptimConfig(lr=1e-3, eps=eps, weight_decay=0.0)
        worker.build(ModelConfig(path=str(tiny_model)), FSDPConfig(), optim, 10)
        before = next(worker.model.parameters()).full_tensor().clone()
        worker.update([weighted_step("delta-l")], LOSS, LIMITS["all"], 1.0)
        moved.append((next(worker.model.parameters()).full_tensor() - before).abs().max().item())
    assert moved[0] == pytest.approx(1e-3, rel=0.01)
    assert 0 < moved[1] < 1e-6


def test_updates_are_those_of_adamw(tiny_model: Path) -> None:
    """Its settings, clipped gradients and the schedule, against torch's own on plain tensors."""
    optim = OptimConfig(
        lr=0.01,
        betas=[0.5, 0.7],
        weight_decay=0.3,
        eps=1e-3,
        lr_warmup_steps_ratio=0.2,
        warmup_style="linear",
        min_lr_ratio=0.5,
    )
    worker = PolicyWorker("cpu")
    worker.build(ModelConfig(path=str(tiny_model)), FSDPConfig(), optim, 10)
    step, clip = weighted_step("delta-l"), 0.02
    plain = torch.cat([p.full_tensor().flatten() for p in worker.model.parameters()]).detach()
    options = {"betas": (0.5, 0.7), "weight_decay": 0.3, "eps": 1e-3}
    adamw = torch.optim.AdamW([plain], **options)
    for factor in (0.5, 1, 1, 0.9375):  # two steps of warm-up; then down to a half in eight
        (group,) = adamw.param_groups
        group["lr"] = 0.01 * factor
        plain.grad = gradient(worker, step, LIMITS["all"])
        worker.model.zero_grad()
        assert plain.grad.norm() > 2 * clip
        plain.grad *= clip / plain.grad.norm()
        adamw.step()
        (found,) = worker.update([step], LOSS, LIMITS["all"], clip)
        assert found["lr"] == pytest.approx(0.01 * factor)
    moved = torch.cat([p.full_tensor().flatten() for p in worker.model.parameters()])
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on", [True, False])
def test_layers_see_one_row_and_run_again_on_request(on: bool, tiny_model: Path) -> None:
    """Packed or padded, recomputed or kept."""
    worker, seen = build(tiny_model, on, enable_gradient_checkpointing=on), []
    layer = worker.model.lm.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    step = weighted_step("delta-l")
    gradient(worker, step, LIMITS["all"])
    tokens = [s.num_tokens - 1 for s in step.samples]
    assert seen == ([(1, sum(tokens))] * 2 if on else [(len(tokens), max(tokens))])


def _rank_gradients(
    rank: int, world: int, address: str, folder: Path, out: Path, fsdp_size: int
) -> None:
    """One of `world` processes: gradients of all `PAIRS`, or of one by every limit."""
    torch.set_num_threads(1)
    policy = PolicyWorker("cpu")
    policy.connect(rank, world, address, 77)
    results = {}
    every = fsdp_size == -1
    for remove_padding in (True, False) if every else (True,):
        model = ModelConfig(path=str(folder), use_remove_padding=remove_padding)
        policy.build(model, FSDPConfig(fsdp_size=fsdp_size), OptimConfig(lr=1e-3), 10)
        groups = next(policy.model.parameters()).device_mesh.get_all_groups()
        for group in [dist.group.WORLD, *groups]:
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout.total_seconds() == 77
        parameters = sum(p.numel() for p in policy.model.parameters())
        held = sum(p.to_local().numel() for p in policy.model.parameters())
        share = parameters // (world if fsdp_size == -1 else fsdp_size)
        assert share <= held < 1.2 * share
        turns = {p: turn(*p) for p in PAIRS}
        runs = [(*p, name) for p, (packed, name) in turns.items() if packed is remove_padding]
        for run in runs if every else [("vanilla", "delta-l", name) for name in LIMITS]:
            step, loss = pair(*run[:2])
            share = balanced_partitions([s.num_tokens for s in step.samples], world)[rank]
            results[run] = gradient(policy, step.share(share), LIMITS[run[2]], loss)
        # One rank has nothing at all.
        step, loss = pair("vanilla", "delta-l")
        lonely = step.share(range(len(LENGTHS)) if rank == 0 else [])
        results["vanilla", "delta-l", f"{remove_padding}"] = gradient(
            policy, lonely, LIMITS["four"]
        )
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
    # Without an interpreter that is torn down: gloo's threads may still hold a tensor, and whoever
    # waits for the GIL by then is ended amid C++ that may not throw, which aborts the process.
    # Errors never come here: torch.multiprocessing passes them on.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.mark.parametrize(("world", "fsdp_size"), [(2, -1), (4, 2)])
def test_ranks_do_not_change_the_gradient(
    world: int, fsdp_size: int, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Also where groups of `fsdp_size` ranks hold a copy of the model each."""
    out = tmp_path / "gradients.pt"
    mp.spawn(_rank_gradients, (world, free_address(), tiny_model, out, fsdp_size), nprocs=world)
    results = torch.load(out, weights_only=True)
    assert len(results) == (len(PAIRS) + 2 if fsdp_size == -1 else len(LIMITS) + 1)
    for (mode, weighting, _), value in results.items():
        step, loss = pair(mode, weighting)
        expected = gradient(worker, step, LIMITS["all"], loss)
        # A product over the response raises e to a sum, and so multiplies its rounding.
        limit = 3e-6 if mode == "vespo" else 1e-6
        assert distance(value, expected) < limit, (mode, weighting)


ALONE = replace(LOSS, entropy_coeff=0.0, kl_coef=0.0)


def alone(sample: Sample) -> OptimizerStep:
    return OptimizerStep([sample], np.ones(1, np.float32))


def norm_by_autograd(folder: Path, s: Sample) -> float:
    """‖Σ_t A_t ∇ log π(a_t)‖ of one response, in float64 on the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))
    logits = model(ids[None]).logits[0, len(s.prompt.token_ids) - 1 : -1] / ALONE.temperature
    taken = logits.log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
    loss = (
        torch.tensor(s.advantages()) * taken[slice(None) if s.loss_mask is None else s.loss_mask]
    ).sum()
    return (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        .norm()
        .item()
    )


def unlike_samples() -> list[Sample]:
    """Before the first update; one with a mask, one with an advantage for each token."""
    samples = make_samples(LENGTHS, old_log_probs=None)
    samples[4].loss_mask = np.arange(LENGTHS[4]) % 3 > 0
    samples[5].token_advantages = np.linspace(-1, 2, LENGTHS[5], dtype=np.float32)
    return samples


def test_gradient_norms_of_single_responses(tiny_model: Path) -> None:
    """Whatever the micro-batches. Weights and the next update are as if nothing had happened."""
    worker, other = build(tiny_model, fsdp=FSDPConfig(param_offload=True)), build(tiny_model)
    samples = unlike_samples()
    for limit in LIMITS.values():
        found = worker.gradient_norms([alone(s) for s in samples], ALONE, limit)
        for s, norm in zip(samples, found, strict=True):
            expected = norm_by_autograd(tiny_model, s) if s.length else 0
            assert norm == pytest.approx(expected, rel=1e-5)
    step = weighted_step("delta-l")
    results = [w.update([step], LOSS, LIMITS["all"], 1.0) for w in (worker, other)]
    assert results[0][0]["grad_norm"] == results[1][0]["grad_norm"]
    for a, b in zip(worker.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def _rank_norms(rank: int, address: str, folder: Path, out: Path) -> None:
    """One of two: each response on one rank alone, or split over both; and of LoRA's adapters."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results = {}
    for split, lora_rank in ((1, 0), (2, 0), (1, 4), (2, 4)):
        policy = PolicyWorker("cpu")
        model = ModelConfig(str(folder), lora_rank=lora_rank)
        policy.build(model, FSDPConfig(), OptimConfig(lr=1e-3), 10, split)
        mine = [
            alone(s).share([0] if split == 2 or i % 2 == rank else [])
            for i, s in enumerate(make_samples(LENGTHS, old_log_probs=None))
        ]
        results[split, lora_rank] = policy.gradient_norms(mine, ALONE, LIMITS["four"])
    by_rank: list[Any] = [None, None]
    dist.all_gather_object(by_rank, results)
    assert by_rank[0] == by_rank[1]
    if rank == 0:
        out.write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as above


def test_two_ranks_find_the_norms_that_one_finds(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "norms"
    mp.spawn(_rank_norms, (free_address(), tiny_model, out), nprocs=2)
    steps = [alone(s) for s in make_samples(LENGTHS, old_log_probs=None)]
    for (_, lora_rank), found in pickle.loads(out.read_bytes()).items():
        worker = build(tiny_model, lora_rank=lora_rank)
        expected = worker.gradient_norms(steps, ALONE, LIMITS["all"])
        assert found == pytest.approx(expected, rel=1e-5)
        assert [norm > 0 for norm in found] == [length > 0 for length in LENGTHS]


SPLITS = {4: [range(8)], 2: [range(5), range(5, 8)], 1: [range(2 * i, 2 * i + 2) for i in range(4)]}
"""Ranks that split sequences → the samples of each such group of four ranks."""
SEQUENCE_LOSS = replace(LOSS, rollout_is="sequence", loss_mode="geo_mean")
"""Which sees responses as a whole."""


def masked_step() -> OptimizerStep:
    samples = make_samples(LENGTHS)
    samples[4].loss_mask = np.arange(LENGTHS[4]) % 3 > 0
    return weighted_step("delta-l", samples)


def _compare_sinks(rank: int) -> None:
    """Attention with sinks, over two heads a rank, and over all in one: each head keeps its own."""
    q, k, v = torch.randn(3, 1, 8, 12, 4, generator=torch.Generator().manual_seed(0))
    sinks = torch.arange(8.0)

    def with_sinks(module: Any, q: Any, k: Any, v: Any, mask: None, s_aux: Any) -> Any:
        scores = torch.cat([q @ k.mT, s_aux[None, :, None, None].expand(1, -1, 12, 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2), None

    piece, options = slice(3 * rank, 3 * rank + 3), {"s_aux": sinks}
    pieces = (x[:, :, piece] for x in (q, k, v))
    found = over_ranks(with_sinks, None, *pieces, None, sequence_group=dist.group.WORLD, **options)
    expected = over_ranks(with_sinks, None, q, k, v, None, **options)
    torch.testing.assert_close(found[0], expected[0][:, piece])


def _rank_splits(rank: int, address: str, folder: Path, out: Path) -> None:
    """One of four processes, with a reference that is split otherwise."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    _compare_sinks(rank)
    step, results = masked_step(), {}
    for split, ref_split, recompute, fsdp_size in ((4, 2, True, -1), (2, 1, False, 2)):
        policy = PolicyWorker("cpu")
        model = ModelConfig(str(folder), enable_gradient_checkpointing=recompute)
        settings = FSDPConfig(fsdp_size=fsdp_size), OptimConfig(lr=1e-3), 10
        policy.build(model, *settings, sequence_parallel=split)
        policy.build_beside("ref", model, FSDPConfig(), None, 0, ref_split)
        widths: list[int] = []
        layer = policy.model.lm.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda _, args, to=widths: to.append(args[0].shape[1]))
        share, ref_share = (SPLITS[s][rank // s] for s in (split, ref_split))
        mine = step.share(share)
        for name, limit in LIMITS.items():
            widths.clear()
            found = gradient_and_sums(policy, mine, limit, SEQUENCE_LOSS)
            seen = set(widths)
            known = dict(zip(share, log_probs_of(policy, mine.samples, 0.9, limit), strict=True))
            ref = step.share(ref_share).samples
            of_ref = log_probs_of(policy.beside["ref"], ref, 0.9, limit)
            ref_known = dict(zip(ref_share, of_ref, strict=True))
            passes = len(policy.micro_batches(mine.samples, limit))
            by_rank: list[Any] = [None] * 4
            dist.all_gather_object(by_rank, (found[1], known, ref_known, seen, passes))
            results[split, name] = found[0], by_rank
    if rank == 0:
        out.write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as above


def test_ranks_that_split_sequences_change_nothing(tmp_path: Path) -> None:
    """Four heads with two of keys and values, one layer that looks 6 tokens back. Lengths that
    ranks can't divide, micro-batches that only one group of ranks has; each rank computes its part
    of the tokens alone."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    folder = make_tiny_model(tmp_path / "model", initializer_range=0.02, **shape, **window)
    out, step, alone = tmp_path / "results", masked_step(), build(folder)
    mp.spawn(_rank_splits, (free_address(), folder, out), nprocs=4)
    results = pickle.loads(out.read_bytes())
    assert len(results) == 2 * len(LIMITS)
    tokens = [s.num_tokens - 1 for s in step.samples]
    for (split, name), (found, by_rank) in results.items():
        sums, known, ref_known, widths, _ = zip(*by_rank, strict=True)
        expected, expected_sums = gradient_and_sums(alone, step, LIMITS[name], SEQUENCE_LOSS)
        assert distance(found, expected) < 1e-6
        metrics = update_metrics([[s] for s in sums])
        assert metrics == pytest.approx(update_metrics([[expected_sums]]), rel=1e-6, abs=1e-6)
        expected_log_probs = log_probs_of(alone, step.samples, 0.9, LIMITS[name])
        for of_rank in (*known, *ref_known):
            for i, log_probs in of_rank.items():
                np.testing.assert_allclose(log_probs, expected_log_probs[i], atol=1e-6)
        for found_by in (known, ref_known):
            assert set().union(*found_by) == set(range(8))
        if name == "all":
            shares = [SPLITS[split][rank // split] for rank in range(4)]
            assert [*widths] == [{-(-sum(tokens[i] for i in s) // split)} for s in shares]
    assert results[2, "one"][1][0][-1] == 5  # passes, of which the other group's last two are empty
    assert results[4, "tokens"][1][0][-1] == 1  # of 4 · 40 tokens


def test_a_response_without_weight_changes_nothing(worker: PolicyWorker) -> None:
    step = weighted_step("delta-l")
    step.weights[4] = 0.0
    with_it = gradient(worker, step, LIMITS["four"])
    without = gradient(worker, step.share([0, 1, 2, 3, 5, 6, 7]), LIMITS["four"])
    assert distance(with_it, without) < 1e-6


def test_nothing_but_empty_responses_gives_a_zero_gradient(tiny_model: Path) -> None:
    worker = build(tiny_model)
    step = weighted_step("delta-l", make_samples([0, 0]))
    assert gradient(worker, step, LIMITS["one"]).abs().max() == 0
    result = worker.update([step.share([])], LOSS, LIMITS["one"], 1.0)
    assert result[0]["grad_norm"] == 0


def test_sums_that_are_reported(worker: PolicyWorker, tiny_model: Path) -> None:
    step = weighted_step("token-mean")
    sums = worker.accumulate_gradient(step, LOSS, LIMITS["four"])
    expected, _ = reference_loss(tiny_model, step)
    # Every response has the same weight under token-mean, so the entropy can be put back in.
    weight = step.weights[0]
    total = sums["w/pg_loss"] - 0.05 * weight * sums["entropy"] + 0.1 * sums["w/kl_loss"]
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert sums["tokens"] == sum(LENGTHS)


def test_log_probs_are_those_of_the_plain_model(worker: PolicyWorker, tiny_model: Path) -> None:
    samples = make_samples(LENGTHS)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = log_probs_of(worker, samples, 0.7, MicroBatchLimit(3))
    for s, log_probs in zip(samples, found, strict=True):
        ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
        start = len(s.prompt.token_ids) - 1
        logits = model(ids).logits[0, start : start + s.length] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
        np.testing.assert_allclose(log_probs, expected.detach().numpy(), atol=1e-5)


def test_log_probs_leave_the_parameters_sharded(worker: PolicyWorker) -> None:
    worker.log_probs(make_samples(LENGTHS), 1.0, LIMITS["all"])
    assert all(isinstance(p, DTensor) for p in worker.model.parameters())


def test_first_update_needs_no_old_log_probs(tiny_model: Path) -> None:
    known, unknown = build(tiny_model), build(tiny_model)
    step, loss = weighted_step("dr-grpo"), LossConfig()
    values = log_probs_of(known, step.samples, 1.0, LIMITS["all"])
    for sample, value in zip(step.samples, values, strict=True):
        sample.old_log_probs = value
    first = known.update([step], loss, LIMITS["four"], 1.0)
    for sample in step.samples:
        sample.old_log_probs = None
    second = unknown.update([step], loss, LIMITS["four"], 1.0)
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=1e-4)
    for a, b in zip(known.model.parameters(), unknown.model.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), atol=2e-5, rtol=0)


def test_truncated_importance_sampling_by_hand(worker: PolicyWorker) -> None:
    """Engines that drew with other probabilities than the actor's: factors 1/2 and 4, cut at 3."""
    samples = make_samples([2, 0, 1])
    for s in samples:
        s.old_log_probs = s.rollout_log_probs + np.float32(np.log(0.5))
    samples[2].old_log_probs = samples[2].rollout_log_probs + np.float32(np.log(4.0))
    step = constant_step(samples, 0.1)
    plain = [gradient(worker, step.share([i]), LIMITS["all"], LossConfig()) for i in range(3)]
    config = LossConfig(rollout_is_threshold=3.0)
    for level, factors in (("token", (0.5, 1, 3)), ("sequence", (0.25, 1, 3))):
        worker.model.zero_grad()
        sums = worker.accumulate_gradient(step, replace(config, rollout_is=level), LIMITS["one"])
        found = torch.cat([p.grad.full_tensor().flatten() for p in worker.model.parameters()])
        assert sums["rollout/is_weight_mean"] == pytest.approx(2 * factors[0] + factors[2])
        assert sums["rollout/logprob_diff_max"] == pytest.approx(np.log(4), rel=1e-5)
        assert sums["rollout/logprob_diff_mean"] == pytest.approx(np.log(16), rel=1e-5)
        assert sums["rollout/kl"] == pytest.approx(0, abs=1e-5)
        assert sums["rollout/tokens"] == 3
        expected = sum(f * g for f, g in zip(factors, plain, strict=True))
        assert distance(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("level", "factors"), [(None, (1, 1)), ("token", (2, 3)), ("sequence", (3, 3))]
)
def test_reinforce_by_hand(
    level: str | None, factors: tuple[float, float], worker: PolicyWorker
) -> None:
    """−A·log π, by the ratio of the policy that is trained to the engine: 2 a token, and 4; their
    products are 8 and 4; cut at 3. Whatever the old log-probabilities are."""
    samples = make_samples([3, 1])
    own = log_probs_of(worker, samples, 1.0, LIMITS["all"])
    for s, values, ratio in zip(samples, own, (2, 4), strict=True):
        s.rollout_log_probs, s.old_log_probs = values - np.float32(np.log(ratio)), None
    step = constant_step(samples, 0.1)
    plain = [gradient(worker, step.share([i]), LIMITS["all"], LossConfig()) for i in range(2)]
    config = LossConfig("reinforce", rollout_is=level, rollout_is_threshold=3.0)
    expected = sum(f * g for f, g in zip(factors, plain, strict=True))
    for limit in (LIMITS["one"], LIMITS["all"]):
        assert distance(gradient(worker, step, limit, config), expected) < 1e-5
    sums = worker.accumulate_gradient(step, config, LIMITS["all"])
    losses = [-s.advantage * v.sum() for s, v in zip(samples, own, strict=True)]
    assert sums["w/pg_loss"] == pytest.approx(0.1 * np.dot(factors, losses), rel=1e-5)
    assert sums["ppo_kl"] == pytest.approx(-np.log(2**3 * 4), rel=1e-4)
    if level:
        mean = sums["rollout/is_weight_mean"] / sums["rollout/tokens"]
        assert mean == pytest.approx((3 * factors[0] + factors[1]) / 4, rel=1e-5)


def test_stale_responses_tell_nothing_of_the_engine(worker: PolicyWorker) -> None:
    samples = make_samples([2, 3])
    samples[0].old_log_probs = samples[0].rollout_log_probs
    samples[1].old_log_probs = samples[1].rollout_log_probs + np.float32(0.5)
    step = constant_step(samples, 0.1)
    sums = worker.accumulate_gradient(step, LossConfig(), LIMITS["all"])
    assert sums["rollout/tokens"] == 3
    assert sums["rollout/logprob_diff_mean"] == pytest.approx(1.5)


def test_updates_move_the_policy_towards_what_was_rewarded(tiny_model: Path) -> None:
    worker = build(tiny_model)
    samples = make_samples([4, 4])
    for sample, advantage in zip(samples, (1.0, -1.0), strict=True):
        sample.advantage, sample.old_log_probs = advantage, None
    before = [x.sum() for x in log_probs_of(worker, samples, 1.0, LIMITS["all"])]
    for _ in range(3):
        worker.update([constant_step(samples, 1 / 8)], LossConfig(), LIMITS["one"], 1.0)
    after = [x.sum() for x in log_probs_of(worker, samples, 1.0, LIMITS["all"])]
    assert after[0] > before[0] and after[1] < before[1]


def test_a_step_that_is_not_finite_is_skipped(tiny_model: Path) -> None:
    """The gradient of the second mini-batch is NaN; of the third only the loss is infinite."""
    worker = build(tiny_model)
    good, bad = make_samples([3, 4]), make_samples([3, 4], advantage=float("nan"))
    far = make_samples([3, 4])
    far[0].ref_log_probs = np.full(3, -np.inf, np.float32)
    good, bad, far = (constant_step(samples, 0.1) for samples in (good, bad, far))
    kl = replace(LossConfig(), kl_coef=1e-9, kl_type="k1")
    first = worker.update([good], LossConfig(), LIMITS["all"], 1.0)[0]
    before = [p.full_tensor().clone() for p in worker.model.parameters()]
    step = worker.optimizers[0].state_dict()["state"][0]["step"].item()
    skipped = worker.update([bad], LossConfig(), LIMITS["all"], 1.0)
    skipped += worker.update([far], kl, LIMITS["all"], 1.0)
    assert [first["skipped"], *(s["skipped"] for s in skipped)] == [0, 1, 1]
    for old, new in zip(before, worker.model.parameters(), strict=True):
        assert torch.equal(old, new.full_tensor())
    assert worker.optimizers[0].state_dict()["state"][0]["step"].item() == step
    assert worker.update([good], LossConfig(), LIMITS["all"], 1.0)[0]["skipped"] == 0
    assert not torch.equal(before[0], next(worker.model.parameters()).full_tensor())


def test_what_is_unchanged_is_not_copied_to_the_host_again() -> None:
    mesh, memory = init_device_mesh("cpu", (1,)), HostMemory()
    parameter = DTensor.from_local(torch.tensor([1.0, 2.0]), mesh, [Shard(0)])
    first = memory.store(parameter)
    assert first.to_local().tolist() == [1, 2]
    parameter.to_local().mul_(3)
    assert memory.store(parameter, changed=False).to_local().tolist() == [1, 2]
    last = memory.store(parameter)
    assert last.to_local().tolist() == [3, 6]
    assert last.to_local().data_ptr() == first.to_local().data_ptr()
    state = DTensor.from_local(torch.tensor([7.0]), mesh, [Shard(0)])
    assert memory.store(state, "exp_avg").to_local().tolist() == [7]
    state = DTensor.from_local(torch.tensor([8.0]), mesh, [Shard(0)])  # a step has made a new one
    assert memory.store(state, "exp_avg").to_local().tolist() == [8]
    assert len(memory.places) == 2
    assert memory.store(torch.ones(1)).tolist() == [1]  # a buffer
    # What a GPU's mesh holds stays on the host, too, where torch itself would move it back.
    gpus = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    spec = DTensorSpec(gpus, parameter.placements, parameter._spec.tensor_meta)
    on_a_gpu = DTensor(torch.tensor([5.0, 6.0]), spec, requires_grad=False)
    assert memory.store(on_a_gpu).to_local().device == torch.device("cpu")


@pytest.mark.parametrize("transfer", ["host", "ipc"])
def test_ipc_takes_no_expandable_segments(transfer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = "expandable_segments:True,max_split_size_mb:512"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    PolicyWorker("cpu", transfer)
    left = "max_split_size_mb:512" if transfer == "ipc" else given
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == left
    assert "PYTORCH_ALLOC_CONF" not in os.environ  # which would win


def test_offloading_and_mixed_precision_run(tiny_model: Path) -> None:
    worker = PolicyWorker("cpu")
    half = MixedPrecisionConfig(param_dtype="bfloat16")
    fsdp = FSDPConfig(param_offload=True, optimizer_offload=True, mixed_precision=half)
    model = ModelConfig(path=str(tiny_model))
    worker.build(model, fsdp, OptimConfig(lr=1e-3), 10)
    worker.build_beside("ref", model, FSDPConfig())
    step = weighted_step("delta-l")
    exact = worker.ref_log_probs(step.samples, 1.0, LIMITS["all"])
    rounded = worker.log_probs(step.samples, 1.0, LIMITS["all"])
    assert 0 < np.abs(exact - rounded).max() < 0.2
    results = worker.update([step, step], LOSS, LIMITS["four"], 1.0)
    assert all(np.isfinite(list(r.values())).all() for r in results)
    parameter = next(worker.model.parameters())
    assert parameter.dtype == torch.float32
    places = worker.host.places  # in host memory
    assert {id(parameter), (id(parameter), "exp_avg")} <= places.keys()
    assert not worker.beside["ref"].host.places


@pytest.mark.parametrize("reshard", [True, False])
def test_layers_stay_gathered_and_gradients_are_rounded_on_request(
    reshard: bool, tiny_model: Path
) -> None:
    rounded = MixedPrecisionConfig(reduce_dtype="float32" if reshard else "bfloat16")
    fsdp = FSDPConfig(reshard_after_forward=reshard, mixed_precision=rounded)
    worker = PolicyWorker("cpu")
    worker.build(ModelConfig(path=str(tiny_model)), fsdp, OptimConfig(lr=1e-3), 10)
    step = weighted_step("delta-l")
    worker.model(worker.pack(step.samples), 1.0)
    layer = next(p for n, p in worker.model.lm.named_parameters() if "layers.0" in n)
    assert isinstance(layer, DTensor) == reshard
    worker.model.reshard()
    worker.accumulate_gradient(step, LOSS, LIMITS["all"])
    named = worker.model.lm.named_parameters()
    gradient = next(p.grad for name, p in named if "layers.0" in name).full_tensor()
    assert torch.equal(gradient, gradient.bfloat16().float()) != reshard


def test_exported_weights_rebuild_the_model(worker: PolicyWorker, tiny_model: Path) -> None:
    expected = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    version, chunks = worker.plan_export(None, 40_000)
    found = {}
    for chunk in chunks:
        weights = worker.export(chunk, "host").tensors
        assert [str(w.dtype) for w in weights] == [f"torch.{chunk.dtype}"] * len(weights)
        assert [list(w.shape) for w in weights] == chunk.shapes
        assert len(weights) == 1 or sum(w.nbytes for w in weights) <= 40_000
        found |= dict(zip(chunk.names, weights, strict=True))
    worker.finish_export()
    assert version == 0 and len(chunks) > 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_resumed_settings_are_those_of_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    """Checkpoints hold the optimizer's states and the step, not the learning rate."""
    step = weighted_step("delta-l")
    fsdp = FSDPConfig(param_offload=True)
    workers = []
    for lr in (1e-3, 5e-4):
        worker = PolicyWorker("cpu")
        optim = OptimConfig(lr=lr, lr_warmup_steps=4, weight_decay=lr)
        worker.build(ModelConfig(path=str(tiny_model)), fsdp, optim, 10)
        workers.append(worker)
    saved, resumed = workers
    for _ in range(2):
        saved.update([step], LOSS, LIMITS["all"], 1.0)
    saved.save(str(tmp_path / "actor"))
    resumed.load(str(tmp_path / "actor"))
    for a, b in zip(saved.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
        states = [w.optimizers[0].state[p] for w, p in ((saved, a), (resumed, b))]
        assert torch.equal(*(s["exp_avg"].full_tensor() for s in states))
    found = resumed.update([step], LOSS, LIMITS["all"], 1.0)[0]["lr"]
    assert found == pytest.approx(5e-4 * 3 / 4)  # the third of four steps of warm-up
    assert resumed.optimizers[0].param_groups[0]["weight_decay"] == 5e-4


def _next_losses(worker: PolicyWorker) -> list[float]:
    """The losses of two optimizer steps, over all ranks."""
    step = weighted_step("delta-l")
    share = balanced_partitions([s.num_tokens for s in step.samples], dist.get_world_size())
    mine = step.share(share[dist.get_rank()])
    updates = [worker.update([mine], LOSS, LIMITS["four"], 1.0)[0] for _ in range(2)]
    losses = torch.tensor([update["w/pg_loss"] for update in updates], dtype=torch.float64)
    dist.all_reduce(losses)
    return losses.tolist()


def _rank_saves(
    rank: int, world: int, address: str, model: Path, folder: Path, load: str | None
) -> None:
    """Trains and saves `two`, or loads; then the next losses. Runs in a process of its own."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    worker = build(model)
    if load is None:
        _next_losses(worker)
        worker.save(str(folder / "two"))
    else:
        worker.load(str(folder / load))
    losses = _next_losses(worker)
    if rank == 0:
        (folder / f"losses of two after {load}").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as above


def test_any_number_of_ranks_resumes_what_another_saved(tiny_model: Path, tmp_path: Path) -> None:
    mp.spawn(_rank_saves, (2, free_address(), tiny_model, tmp_path, None), nprocs=2)
    expected = json.loads((tmp_path / "losses of two after None").read_text())
    assert abs(expected[0] - expected[1]) > 1e-4  # they tell one step from another
    alone = build(tiny_model)
    alone.load(str(tmp_path / "two"))
    alone.save(str(tmp_path / "one"))
    assert _next_losses(alone) == pytest.approx(expected, abs=1e-6)
    mp.spawn(_rank_saves, (2, free_address(), tiny_model, tmp_path, "one"), nprocs=2)
    back = json.loads((tmp_path / "losses of two after one").read_text())
    assert back == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("saved", "asked_for", "read"),
    [
        (["model", "optimizer", "extra"], ["model", "extra"], {"model"}),
        (["model"], ["model", "optimizer"], {"model"}),
        (["hf_model"], ["hf_model"], {"hf_model"}),
        (["model", "hf_model"], ["model", "hf_model"], {"model", "hf_model"}),
        (["optimizer", "hf_model"], ["optimizer", "hf_model"], {"optimizer", "hf_model"}),
    ],
)
def test_what_a_checkpoint_holds_and_what_is_read(
    saved: list[str], asked_for: list[str], read: set[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Weights by either way, with an optimizer that has states only if they were read."""
    worker, folder = build(tiny_model), tmp_path / "actor"
    step = weighted_step("delta-l")
    worker.update([step], LOSS, LIMITS["all"], 1.0)
    worker.save(folder, saved)
    assert (folder / "huggingface").is_dir() == ("hf_model" in saved)
    resumed = build(tiny_model, override_config={"rope_theta": 20000})
    assert resumed.load(folder, asked_for) == read
    assert resumed.version == 1
    for a, b in zip(worker.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
    moments = [o.optimizers[0].state_dict()["state"] for o in (worker, resumed)]
    if "optimizer" in read:
        assert torch.equal(*(m[0]["exp_avg"].full_tensor() for m in moments))
    else:
        assert not moments[1]
    with pytest.raises(ValueError, match=r"but no weights among checkpoint.load_contents"):
        resumed.load(folder, {"model", "hf_model"} - {*saved})


class Evil:
    """Pickled, it calls a function."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_a_checkpoint_executes_nothing(
    where: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = build(tiny_model)
    _next_losses(worker)
    worker.save("actor")
    if where == "metadata":
        Path("actor/.metadata").write_bytes(pickle.dumps(Evil()))
    else:  # torch's own reader would unpickle the number of steps
        state = worker._state(["model", "optimizer"])
        state["training_steps"] = Evil()
        dcp.save(state, checkpoint_id="actor")
    with pytest.raises(ValueError, match=r"is not what a checkpoint is made of|weights_only"):
        worker.load("actor")
    assert not Path("evil").exists()


def test_learning_rate() -> None:
    warm = OptimConfig(lr_warmup_steps=4)
    assert [learning_rate_factor(i, warm, 10) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    ratio = OptimConfig(lr_warmup_steps_ratio=0.2, warmup_style="linear", min_lr_ratio=0.5)
    assert [learning_rate_factor(i, ratio, 10) for i in (0, 1, 2, 6, 10)] == [0.5, 1, 1, 0.75, 0.5]
    cosine = OptimConfig(warmup_style="cosine")
    assert learning_rate_factor(5, cosine, 10) == pytest.approx(0.5)
    waves = OptimConfig(warmup_style="cosine", num_cycles=1.0, min_lr_ratio=0.2)
    found = [learning_rate_factor(i, waves, 8) for i in (0, 2, 4, 6, 8)]
    assert found == pytest.approx([1, 0.6, 0.2, 0.6, 1])
