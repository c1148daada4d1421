"""LoRA against the dense model: gradients, merged weights, the reference, checkpoints, adapters."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import VOCABULARY, free_address, make_samples, make_step, make_tiny_model
from tests.models.families import make_family
from tests.models.sweep import send_weights
from verl.algorithms.losses import LossConfig
from verl.config.base import FSDPConfig, ModelConfig, OptimConfig
from verl.config.base import LoraConfig as LoraKeys
from verl.config.schema import RolloutConfig
from verl.models.folder import check_model
from verl.models.hf import load_hf_model
from verl.models.lora import adapters, add_adapters
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt
from verl.rollout.engine import SamplingParams
from verl.rollout.hf import HFEngine
from verl.utils.seqlen_balancing import balanced_partitions

LENGTHS = [3, 9, 0, 1, 20, 7]
LIMIT = MicroBatchLimit(None, 40)
LOSS = LossConfig(entropy_coeff=0.05, kl_coef=0.1, temperature=0.9)
LORA = {"lora_rank": 4, "lora_alpha": 6}  # s = 1.5


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), initializer_range=0.05)


def build(folder: Path, fsdp: FSDPConfig | None = None, moved: bool = True, **model: Any) -> Any:
    """A worker whose products B·A are not 0, if they are to be `moved`."""
    worker = PolicyWorker("cpu")
    config = ModelConfig(path=str(folder), **(LORA | model))
    worker.build(config, fsdp or FSDPConfig(), OptimConfig(lr=1e-2), 10)
    torch.manual_seed(1)
    for name, parameter in adapters(worker.model.lm).items() if moved else ():
        if ".lora_B." in name:
            parameter.data.copy_(
                DTensor.from_local(torch.randn(parameter.shape) / 20, parameter.device_mesh)
                if dist.get_world_size() == 1
                else parameter
            )
    return worker


def step_of(seed: int = 0) -> OptimizerStep:
    samples = make_samples(LENGTHS, seed)
    return make_step(samples, "delta-l", max_response_length=24, alpha=0.75)


def gradients(worker: PolicyWorker, step: OptimizerStep) -> dict[str, torch.Tensor]:
    worker.model.zero_grad()
    worker.accumulate_gradient(step, LOSS, LIMIT)
    found = worker.model.lm.named_parameters()
    return {name: p.grad.full_tensor() for name, p in found if p.grad is not None}


def exported(worker: PolicyWorker, stored: bool = False) -> dict[str, torch.Tensor]:
    """What engines get."""
    weights = {}
    for chunk in worker.plan_export(None, 40_000, stored)[1]:
        weights |= dict(zip(chunk.names, worker.export(chunk, "host").tensors, strict=True))
    worker.finish_export()
    return weights


def merged(worker: PolicyWorker, folder: Path) -> Any:
    """The plain model, merged by PEFT from the adapter that the worker writes."""
    worker.save_hf(folder)
    base = AutoModelForCausalLM.from_pretrained(worker.model_config.path)
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


@pytest.mark.parametrize(
    "options",
    [
        {"use_remove_padding": True, "enable_gradient_checkpointing": True},
        {"use_remove_padding": False, "enable_gradient_checkpointing": False},
    ],
    ids=["packed-recomputed", "padded"],
)
def test_gradients_are_the_dense_ones_in_the_adapters_subspace(
    options: dict[str, bool], tiny_model: Path, tmp_path: Path
) -> None:
    """With W' = W + s·B·A and the dense gradient G at W': dL/dA = s·Bᵀ·G, dL/dB = s·G·Aᵀ."""
    worker = build(tiny_model, **options)
    merged(worker, tmp_path / "adapter").save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "dense")
    dense = gradients(build(tmp_path / "dense", moved=False, lora_rank=0, **options), step_of())
    found = gradients(worker, step_of())
    modules = dict(worker.model.lm.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, LoraLayer)}
    assert len(layers) == 2 * 7 and len(found) == 2 * 14  # and nothing else has a gradient
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        G = dense[f"{name}.weight"]
        expected = {"lora_A": 1.5 * B.full_tensor().T @ G, "lora_B": 1.5 * G @ A.full_tensor().T}
        for part, value in expected.items():
            difference = found[f"{name}.{part}.default.weight"] - value
            assert difference.norm() < 1e-5 * value.norm()


def test_gradients_are_finite_differences(tiny_model: Path) -> None:
    """Central ones of a smooth loss: of each adapter along its gradient."""
    worker, step, loss = build(tiny_model), step_of(), LossConfig(loss_mode="gpg")
    worker.accumulate_gradient(step, loss, LIMIT)
    trained = [p for p in worker.model.lm.parameters() if p.grad is not None]
    gradient = [p.grad.full_tensor().clone() for p in trained]
    assert len(trained) == 28
    for p, g in zip(trained, gradient, strict=True):
        place, found = p.full_tensor().clone(), []
        for distance in (0.01, -0.01):
            with torch.no_grad():
                p.to_local().copy_(place + distance * g / g.norm())
            found.append(worker.accumulate_gradient(step, loss, LIMIT)["w/pg_loss"])
        with torch.no_grad():
            p.to_local().copy_(place)
        assert (found[0] - found[1]) / 0.02 == pytest.approx(g.norm().item(), rel=0.01)


def test_adapters_are_float32_beside_any_model(tiny_model: Path) -> None:
    config = ModelConfig(str(tiny_model), **LORA)
    lm = add_adapters(load_hf_model(config, torch.bfloat16), config)
    trained = {p for p in lm.parameters() if p.requires_grad}
    assert trained == {*adapters(lm).values()}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in {*lm.parameters()} - trained} == {torch.bfloat16}


def test_layers_are_chosen_by_name(tiny_model: Path) -> None:
    options = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*up_proj"}
    names = {n.partition(".lora_")[0] for n in adapters(build(tiny_model, **options).model.lm)}
    layers = ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]
    assert names == {f"base_model.model.model.layers.{name}" for name in layers}


def test_only_adapters_are_trained(tiny_model: Path) -> None:
    worker = build(tiny_model, moved=False)
    before = {name: p.full_tensor().clone() for name, p in worker.model.named_parameters()}
    for seed in range(2):
        worker.update([step_of(seed)], LOSS, LIMIT, 1.0)
    (optimizer,) = worker.optimizers
    assert len(optimizer.state) == sum(len(g["params"]) for g in optimizer.param_groups) == 28
    for name, parameter in worker.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name]) != (".lora_" in name), name


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_engines_get_what_peft_merges(kind: str, tmp_path: Path) -> None:
    """GPT-2's layers hold their weights transposed."""
    model = make_tiny_model(tmp_path / "base", kind)
    worker = build(model, use_remove_padding=kind != "GPT2")
    expected = dict(merged(worker, tmp_path / "adapter").named_parameters())
    found, base = exported(worker), AutoModelForCausalLM.from_pretrained(model)
    assert found.keys() == expected.keys() == dict(base.named_parameters()).keys()
    moved = 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].data, rtol=0, atol=1e-6)
        moved += not torch.equal(value, base.get_parameter(name))
    assert moved == 2 * (4 if kind == "GPT2" else 7)


def test_an_engine_is_the_actor_before_and_after_updates(tiny_model: Path) -> None:
    worker, engine = build(tiny_model, moved=False), HFEngine()
    engine.build(worker.model_config, RolloutConfig(), "cpu", 60)
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, rng.integers(3, 100, 5 + i), "countdown", {}) for i in range(3)]

    def difference() -> float:
        samples = engine.generate_all(prompts, [0, 1, 2], SamplingParams(4, 20))
        ours = np.concatenate([s.rollout_log_probs for s in samples])
        return float(np.abs(ours - worker.log_probs(samples, 1.0, LIMIT)).max())

    assert difference() < 1e-4
    for seed in range(3):
        worker.update([step_of(seed)], LOSS, LIMIT, 1.0)
    assert difference() > 1e-2
    send_weights(worker, engine)
    assert difference() < 1e-4


@pytest.mark.parametrize(
    ("family", "layers"),
    [("Gemma 3", 14), ("Qwen3-MoE", 8), ("DeepSeek-V3", 10), ("PhiMoE", 8)],
)
def test_what_belongs_to_images_and_experts_stays_as_it_is(
    family: str, layers: int, tmp_path: Path
) -> None:
    """Adapters stand beside the decoder's linear layers alone, and PEFT reads them."""
    folder = make_family(family, tmp_path / "base")
    worker, engine = build(folder), HFEngine()
    before = {name: p.full_tensor().clone() for name, p in worker.model.lm.named_parameters()}
    worker.update([step_of()], LOSS, LIMIT, 1.0)
    for name, parameter in worker.model.lm.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name]) != (".lora_" in name), name
    assert len(adapters(worker.model.lm)) == 2 * layers
    merged(worker, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    expected, sent = load_file(tmp_path / "merged/model.safetensors"), exported(worker, stored=True)
    assert sent.keys() == expected.keys()
    for name, value in sent.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    engine.build(ModelConfig(path=str(folder)), RolloutConfig(max_num_seqs=8), "cpu", 60)
    send_weights(worker, engine)
    prompts = [s.prompt for s in make_samples(LENGTHS)]
    samples = engine.generate_all(prompts, range(len(prompts)), SamplingParams(2, 20))
    ours = np.concatenate([s.rollout_log_probs for s in samples])
    assert np.abs(ours - worker.log_probs(samples, 1.0, LIMIT)).max() < 1e-4
    worker.save(tmp_path / "actor")
    resumed = build(folder, moved=False)
    resumed.load(tmp_path / "actor")
    assert losses(resumed) == losses(worker)


def test_the_reference_is_the_model_without_adapters(tiny_model: Path) -> None:
    worker, base = build(tiny_model), build(tiny_model, moved=False, lora_rank=0)
    assert not worker.beside  # no second copy
    samples = make_samples(LENGTHS)
    expected = base.log_probs(samples, 0.7, LIMIT)
    np.testing.assert_array_equal(worker.ref_log_probs(samples, 0.7, LIMIT), expected)
    assert np.abs(worker.log_probs(samples, 0.7, LIMIT) - expected).max() > 1e-2
    assert len(gradients(worker, step_of())) == 28  # they are on again


def losses(worker: PolicyWorker) -> list[float]:
    """Of two optimizer steps, over all ranks."""
    step = step_of(3)
    shares = balanced_partitions([s.num_tokens for s in step.samples], dist.get_world_size())
    mine = step.share(shares[dist.get_rank()])
    found = torch.tensor(
        [worker.update([mine], LOSS, LIMIT, 1.0)[0]["w/pg_loss"] for _ in range(2)]
    )
    dist.all_reduce(found)
    return found.tolist()


def test_a_checkpoint_holds_adapters_alone_and_resumes_exactly(
    tiny_model: Path, tmp_path: Path
) -> None:
    offload = FSDPConfig(param_offload=True, optimizer_offload=True)
    worker, resumed = build(tiny_model, offload), build(tiny_model, offload, moved=False)
    worker.update([step_of()], LOSS, LIMIT, 1.0)
    worker.save(tmp_path / "actor")
    saved = dcp.FileSystemReader(tmp_path / "actor").read_metadata().state_dict_metadata
    weights = {name for name in saved if name.startswith("model.")}
    assert len(weights) == 28 and all(".lora_" in name for name in weights)
    assert all(".lora_" in name for name in saved if ".state." in name)
    expected = losses(worker)
    resumed.load(tmp_path / "actor")
    assert losses(resumed) == expected and expected[0] != expected[1]
    names = dict(worker.model.lm.named_parameters())
    for name, parameter in resumed.model.lm.named_parameters():
        assert torch.equal(parameter.full_tensor(), names[name].full_tensor())


@pytest.mark.parametrize(
    "other",
    [
        {"lora_rank": 5},
        {"target_modules": ["k_proj", "q_proj"]},
        {"target_modules": ["k_proj"]},
        {"lora_rank": 0},
    ],
    ids=["rank", "more", "fewer", "dense"],
)
def test_a_checkpoint_of_other_adapters_is_refused(
    other: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    targets = {"target_modules": ["k_proj", "v_proj"]}
    build(tiny_model, **targets).save(tmp_path / "actor", ["model", "hf_model"])
    worker = build(tiny_model, moved=False, **(targets | other))
    for contents in (["model"], ["hf_model"]):
        with pytest.raises(ValueError, match="lora_rank and target_modules that it was") as refused:
            worker.load(tmp_path / "actor", contents)
        assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 500


@pytest.mark.parametrize("lora", [True, False])
def test_a_broken_file_is_no_other_adapter(lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    worker = build(tiny_model, **({} if lora else {"lora_rank": 0}))
    worker.save(tmp_path / "actor", ["hf_model"])
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    os.truncate(tmp_path / "actor/huggingface" / name, 100)
    with pytest.raises(ValueError, match="actor/huggingface: ") as refused:
        worker.load(tmp_path / "actor", ["hf_model"])
    assert "lora_rank" not in str(refused.value)


def _rank(rank: int, world: int, address: str, model: Path, folder: Path) -> None:
    """One of two: loads `one`, trains, saves `two`. One rank has no samples for a while."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    worker = build(model, FSDPConfig(param_offload=True), moved=False)
    worker.load(folder / "one")
    step = step_of().share(range(len(LENGTHS)) if rank == 0 else [])
    found = gradients(worker, step)
    worker.model.zero_grad()
    weights, next_losses = exported(worker) if rank == 0 else _gather(worker), losses(worker)
    worker.save(folder / "two")
    worker.save_hf(folder / "hf")
    if rank == 0:
        torch.save((found, weights, next_losses), folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in test_policy


def _gather(worker: PolicyWorker) -> None:
    for chunk in worker.plan_export(None, 40_000)[1]:
        worker.export(chunk, "host")
    worker.finish_export()


@pytest.mark.parametrize("contents", [["hf_model", "optimizer"], ["model", "optimizer"]])
@pytest.mark.parametrize("merge", [False, True])
def test_a_base_in_bfloat16_with_adapters_in_float32_resumes(
    contents: list[str], merge: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """From the adapter's folder, too, where a checkpoint holds that instead of sharded weights."""
    half, merging = FSDPConfig(model_dtype="bfloat16"), {"lora": LoraKeys(merge=merge)}
    worker, resumed = (build(tiny_model, half, moved, **merging) for moved in (True, False))
    for name, parameter in worker.model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    worker.update([step_of()], LOSS, LIMIT, 1.0)
    worker.save(tmp_path / "actor", contents)
    assert resumed.load(tmp_path / "actor") == {*contents}
    assert losses(resumed) == losses(worker)


def test_two_ranks_do_what_one_does(tiny_model: Path, tmp_path: Path) -> None:
    alone = build(tiny_model)
    alone.save(tmp_path / "one")
    mp.spawn(_rank, (2, free_address(), tiny_model, tmp_path), nprocs=2)
    found, weights, next_losses = torch.load(tmp_path / "found.pt")
    for name, value in gradients(alone, step_of()).items():
        assert (found[name] - value).norm() < 1e-5 * value.norm()
    alone.model.zero_grad()
    for name, value in exported(alone).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    assert losses(alone) == pytest.approx(next_losses, abs=1e-6)
    again = build(tiny_model, moved=False)
    again.load(tmp_path / "two")
    for name, value in exported(alone).items():
        torch.testing.assert_close(exported(again)[name], value, rtol=0, atol=1e-6)
    expected = dict(merged(alone, tmp_path / "adapter").named_parameters())
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    written = PeftModel.from_pretrained(base, tmp_path / "hf").merge_and_unload()
    for name, value in written.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_the_merged_model_is_written_on_request(tiny_model: Path, tmp_path: Path) -> None:
    worker = build(tiny_model, lora=LoraKeys(merge=True))
    worker.save_hf(tmp_path / "hf", "bfloat16")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    for name, value in exported(worker).items():
        torch.testing.assert_close(written.get_parameter(name).data, value.bfloat16())
    assert (tmp_path / "hf/lora_adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "hf/adapter_config.json").exists()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == len(VOCABULARY)


def test_training_goes_on_from_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT's own, with a scale of its own for one layer; the reference is the model without it."""
    torch.manual_seed(2)
    scales = {"alpha_pattern": {"q_proj": 9}, "use_rslora": True, "lora_alpha": 5}
    options = scales | {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.5}
    config = LoraConfig(r=3, init_lora_weights=False, **options)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    peft.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["init_lora_weights"] = True  # it is only about the values to begin from
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    worker = build(tiny_model, moved=False, lora_rank=0, lora_adapter_path=path)
    expected = dict(peft.eval().merge_and_unload().named_parameters())
    for name, value in exported(worker).items():
        torch.testing.assert_close(value, expected[name].data, rtol=0, atol=1e-6)
    base = build(tiny_model, moved=False, lora_rank=0)
    samples = make_samples(LENGTHS)
    np.testing.assert_array_equal(
        worker.ref_log_probs(samples, 1.0, LIMIT), base.log_probs(samples, 1.0, LIMIT)
    )
    assert len(gradients(worker, step_of())) == 2 * 2 * 2


def test_what_cannot_be_trained_is_said_before_a_run(tiny_model: Path, tmp_path: Path) -> None:
    def problem(**options: Any) -> str:
        with pytest.raises(ValueError) as refused:
            check_model(ModelConfig(path=str(tiny_model), **options), 20, export=False)
        assert len(str(refused.value).splitlines()) == 1
        return str(refused.value)

    assert "lm_head" in problem(lora_rank=4, target_modules=["lm_head"])
    assert "embed_tokens" in problem(lora_rank=4, target_modules=["embed_tokens"])
    assert "nowhere" in problem(lora_rank=4, target_modules="nowhere")
    assert "no adapter of PEFT there" in problem(lora_adapter_path=str(tmp_path))
    LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]).save_pretrained(tmp_path / "dora")
    assert "use_dora" in problem(lora_adapter_path=str(tmp_path / "dora"))
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    build(other, moved=False).save_hf(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    assert "don't fit" in problem(lora_adapter_path=path)
