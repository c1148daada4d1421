"""What only a GPU can show: variable-length attention, bf16, NCCL, and the main job there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.helpers import free_address, make_samples, make_step
from tests.trainer.test_main_ppo import read, run, settings  # noqa: F401  a fixture
from verl.algorithms.losses import LossConfig
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=free_address(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_packed_is_padded(one_rank: None, tiny_model: Path) -> None:
    step = make_step(make_samples([3, 9, 0, 1, 20, 7]))
    gradients, log_probs = [], []
    for remove_padding in (True, False):
        worker = PolicyWorker("cuda")
        offload = FSDPConfig(param_offload=True, optimizer_offload=True)
        model = ModelConfig(path=str(tiny_model), use_remove_padding=remove_padding)
        worker.build(model, offload, OptimConfig(lr=1e-3), 10)
        log_probs.append(worker.log_probs(step.samples, 1.0, MicroBatchLimit(4)))
        worker.move(worker.device)
        worker.accumulate_gradient(step, LossConfig(), MicroBatchLimit(4))
        grads = [p.grad.full_tensor().flatten() for p in worker.model.parameters()]
        gradients.append(torch.cat(grads))
    packed, padded = gradients
    assert ((packed - padded).norm() / padded.norm()).item() < 2e-2  # bfloat16
    np.testing.assert_allclose(*log_probs, atol=5e-2)


@pytest.mark.parametrize("eager", [True, False])
def test_main_job(settings: list[str], eager: bool, tmp_path: Path) -> None:  # noqa: F811
    """With the engine `hf`, also compiled."""
    engine = f"actor_rollout_ref.rollout.enforce_eager={eager}"
    run(settings, engine, "trainer.n_gpus_per_node=1", f"trainer.default_local_dir={tmp_path}")
    steps = read(tmp_path)
    assert steps[4]["critic/score/mean"] > steps[1]["critic/score/mean"]
    assert (tmp_path / "huggingface" / "model.safetensors").exists()
