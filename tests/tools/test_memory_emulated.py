"""The memory estimate of the real 3B and 7B models on 4 and 8 GPUs against torch's memory tracker,
which follows an update of tensors that have a shape and no content."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers import QWEN_3B, make_samples, make_tokenizer
from tests.tools.test_memory_plan import QWEN_7B, plan
from verl.config.base import FSDPConfig, MixedPrecisionConfig, ModelConfig
from verl.models import fsdp, logprobs
from verl.models.packing import pack
from verl.utils.device import default_packed_attention, default_tile

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # only its name: no GPU is touched
PROMPT = 1024


@contextmanager
def rank_of_many(ranks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is rank 1 of a group whose collectives do nothing; tensors have no content."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))  # reads numbers, which tensors don't have below
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *_, **__: mesh)
    monkeypatch.setattr(logprobs, "default_tile", lambda _: default_tile(GPU))
    try:
        with FakeTensorMode():
            yield
    finally:
        dist.destroy_process_group()


def build(
    folder: Path, model: dict[str, Any], checkpointing: bool, lora_rank: int, patch: Any
) -> Any:
    """The sharded policy as `build_policy` makes it for GPUs; what rank 0 would send is taken from
    nowhere, as it has no content."""
    (folder / "config.json").write_text(json.dumps(model))
    make_tokenizer().save_pretrained(folder)
    policies = []

    def receive_weights(policy: Any, *_: Any, **__: Any) -> None:
        policies.append(policy.to_empty(device=CPU))

    def receive_buffers(objects: list[Any], _: int) -> None:
        (policy,) = policies
        objects[0] = {name: torch.empty_like(value) for name, value in policy.named_buffers()}

    patch.setattr(fsdp.dcp, "set_model_state_dict", receive_weights)
    patch.setattr(fsdp.dist, "broadcast_object_list", receive_buffers)
    # What is found out from numbers: Qwen's head neither scales nor caps.
    patch.setattr(logprobs, "scale_and_cap", lambda _: (1.0, None))
    patch.setattr(fsdp, "check_policy", lambda *_: None)
    options: Any = {"enable_gradient_checkpointing": checkpointing, "lora_rank": lora_rank}
    config = ModelConfig(str(folder), **options)
    half = FSDPConfig(mixed_precision=MixedPrecisionConfig("bfloat16"))
    policy = fsdp.build_policy(config, half, CPU, pack)
    policy.vocabulary_size = model["vocab_size"]  # the tokenizer's is smaller
    policy.lm.set_attn_implementation(default_packed_attention(GPU, torch.bfloat16))
    return policy


def peak(tracker: FSDPMemTracker) -> dict[str, int]:
    """Bytes at the fullest moment, by kind."""
    (kinds,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(kind, "value", kind): size for kind, size in kinds.items()}


@pytest.mark.series(1)
@pytest.mark.parametrize(
    ("model", "ranks", "checkpointing", "tokens", "split", "lora_rank"),
    [
        (QWEN_3B, 8, False, 9216, 1, 0),
        (QWEN_7B, 8, True, 18432, 2, 0),
        (QWEN_3B, 4, True, 9216, 1, 32),
    ],
    ids=["3B-8-all-activations", "7B-8-sequences-over-two", "3B-4-LoRA"],
)
def test_the_real_models(
    model: dict[str, Any],
    ranks: int,
    checkpointing: bool,
    tokens: int,
    split: int,
    lora_rank: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters, gradients and optimizer to the byte; the peak of the passes within a tenth. The
    second micro-batch is the one that meets gradients of an earlier one."""
    key = "actor_rollout_ref.model.enable_gradient_checkpointing"
    settings = [f"{key}={checkpointing}", f"trainer.n_gpus_per_node={ranks}"]
    settings += [f"actor_rollout_ref.model.lora_rank={lora_rank}"]
    settings += [f"data.max_prompt_length={PROMPT}", f"data.max_response_length={tokens - PROMPT}"]
    settings += [f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={split}"]
    expected = plan(*settings, model=model).training()
    del expected["process"]  # CUDA's own
    samples = make_samples([tokens - PROMPT], prompt_length=PROMPT)
    with rank_of_many(ranks, monkeypatch):
        policy = build(tmp_path, model, checkpointing, lora_rank, monkeypatch)
        group = dist.new_subgroups(split)[0] if split > 1 else None
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with FSDPMemTracker(policy, optimizer) as stepping:
            optimizer.step()
        with FSDPMemTracker(policy, optimizer) as tracker:
            log_probs, entropy = policy(pack(samples, CPU, group=group), 1.0)
            (log_probs + entropy).sum().backward()
        step, passes = peak(stepping), peak(tracker)
    assert passes["Sharded Param"] == expected["parameters"]
    assert passes["Sharded Grad"] == expected["gradients"]
    counts = 4 * len(optimizer.state)  # the steps of each parameter, which are tensors, too
    assert passes["OptState"] == expected["optimizer"] + counts
    assert passes["Total"] == pytest.approx(sum(expected.values()), rel=0.1)
    # A fused step takes no memory of its own.
    kept = ("Sharded Param", "Sharded Grad", "OptState", "Buffer")
    assert step["Total"] == sum(step[name] for name in kept)
    assert [step[name] for name in kept] == [passes[name] for name in kept]
