"""The memory estimate: numbers worked out by hand, and what torch really holds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers import (
    QWEN_3B,
    ROOT,
    free_address,
    make_samples,
    make_step,
    make_tiny_model,
    needs_onednn,
    warm_python,
)
from verl.config.load import load_config
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.models.policy import LossConfig, MicroBatchLimit, PolicyWorker
from verl.rollout.hf import HFEngine
from verl.tools import memory_plan
from verl.tools.memory_plan import GIB, Plan
from verl.utils.device import REORDERED_FROM, default_tile
from verl.weight_sync import CHUNK_BYTES

QWEN_7B = dict(
    model_type="qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
BASE = [
    "data.max_prompt_length=1024",
    "data.max_response_length=8192",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.rollout.max_num_seqs=256",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.8",
    "trainer.n_gpus_per_node=4",
]
OFFLOAD = [
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
]


def plan(
    *overrides: str,
    model: dict[str, Any] = QWEN_7B,
    device: str = "cuda",
    host_memory: float = math.inf,
) -> Plan:
    """On devices of 80 GB."""
    return Plan(load_config([*BASE, *overrides]), model, device, 79.0 * GIB, host_memory)


def test_parameters_are_counted() -> None:
    """7.62 billion, as the model's card says: per layer 2·3584² + 2·512·3584 (attention) + 4608
    (its biases) + 3·3584·18944 + 2·3584 (norms); outside 2·152064·3584 + 3584."""
    layer = 2 * 3584**2 + 2 * 512 * 3584 + 4608 + 3 * 3584 * 18944 + 2 * 3584
    assert plan().parameters == 28 * layer + 2 * 152064 * 3584 + 3584 == 7_615_616_512


def test_rows_are_padded_to_the_ranks() -> None:
    tiny = dict(model_type="llama", hidden_size=2, intermediate_size=3, num_hidden_layers=1)
    tiny |= dict(num_attention_heads=1, vocab_size=5, tie_word_embeddings=True)
    # embeddings 5×2, norm 2; q, k, v, o 2×2, gate and up 3×2, down 2×3, two norms of 2
    assert plan("trainer.n_gpus_per_node=1", model=tiny).shard == 10 + 2 + 16 + 12 + 6 + 4
    # two ranks: 3×2, 1; 4 × (1×2), 2 × (2×2), 1×3, 2 × 1
    assert plan("trainer.n_gpus_per_node=2", model=tiny).shard == 6 + 1 + 8 + 8 + 3 + 2


def test_offloaded_states_move_to_the_host() -> None:
    here, away = plan(), plan(*OFFLOAD)
    quarter = here.shard
    assert abs(quarter - here.parameters / 4) < 1000
    assert here.resting()["parameters"] == 4 * quarter and away.resting()["parameters"] == 0
    assert here.resting()["optimizer"] == 8 * quarter and away.resting()["optimizer"] == 0
    assert "offloaded optimizer" not in here.host()
    assert away.host()["offloaded optimizer"] == 4 * 8 * quarter
    assert here.training() == away.training()


def test_a_reward_model_is_counted() -> None:
    """That of 7 billion parameters beside one of its size, which rests on the device or not."""
    model, on = "reward_model.model", ["reward_model.enable=True", "reward_model.model.path=x"]
    config = load_config([*BASE, *OFFLOAD, *on, "reward_model.micro_batch_size_per_gpu=2"])
    away = load_config([*BASE, *OFFLOAD, *on, f"{model}.fsdp_config.param_offload=True"])
    here = Plan(config, QWEN_7B, "cuda", 79 * GIB, 999 * GIB, {"reward model": QWEN_7B})
    offloaded = Plan(away, QWEN_7B, "cuda", 79 * GIB, 999 * GIB, {"reward model": QWEN_7B})
    shard = here.parameters - 152064 * 3584  # of four ranks, 4 bytes a number; without a head
    assert here.resting()["reward model"] == pytest.approx(shard, rel=1e-6)
    assert offloaded.resting()["reward model"] == 0
    assert offloaded.host()["offloaded reward model"] == pytest.approx(4 * shard, rel=1e-6)
    score, other = here.phases()["score"], offloaded.phases()["score"]
    assert score["reward model"] == other["reward model"] == here.resting()["reward model"]
    # a token's norms in fp32 and bfloat16, its attention and its feed-forward; 2 · 9216 tokens
    width = (4 + 4 * 2) * 3584 + 2 * (5 * 3584 + 3 * 18944)
    assert score["activations"] == 2 * 9216 * width and other["activations"] == 16384 * width
    with_, without = here.phases()["train"], plan(*OFFLOAD).phases()["train"]
    assert sum(with_.values()) - sum(without.values()) == here.resting()["reward model"]
    keys = next(
        Plan(config, QWEN_7B, "cuda", 45 * GIB, math.inf, {"reward model": QWEN_7B}).remedies()
    )
    assert keys == {f"{model}.fsdp_config.param_offload": True}


def test_a_critic_is_counted() -> None:
    """One of the policy's size, without its head: 4 bytes a parameter, 8 more of states, and in its
    own update 4 of gradients. What is offloaded lies on the host."""
    on = ["algorithm.adv_estimator=gae", "critic.model.path=x"]
    on += ["critic.ppo_micro_batch_size_per_gpu=1"]
    fsdp = "critic.model.fsdp_config"
    off = [f"{fsdp}.param_offload=True", f"{fsdp}.optimizer_offload=True"]
    here, away = (
        Plan(load_config([*BASE, *on, *more]), QWEN_7B, "cuda", 79 * GIB, 9999 * GIB, beside)
        for more in ([], off)
        for beside in [{"critic": QWEN_7B}]
    )
    shard = (here.parameters - 152064 * 3584) / 4
    rests = here.resting()
    assert rests["critic"] == pytest.approx(4 * shard, rel=1e-6)
    assert rests["critic's optimizer"] == 2 * rests["critic"]
    assert away.resting()["critic"] == 0 and "critic's optimizer" not in away.resting()
    for a_plan in (here, away):
        update = a_plan.phases()["train critic"]
        assert update["critic's gradients"] == update["critic"] == rests["critic"]
        assert update["critic's optimizer"] == 2 * rests["critic"]
        # No logits, and no head: less than the policy's of as many tokens.
        assert 0 < update["critic's activations"] < a_plan.training()["activations"]
    extra = sum(here.phases()["train"].values()) - sum(plan().phases()["train"].values())
    assert extra == 3 * rests["critic"]
    assert away.host()["offloaded critic"] == 4 * rests["critic"]
    assert away.host()["offloaded optimizer"] == 4 * 2 * rests["critic"]


def test_parameters_in_bfloat16_take_half() -> None:
    """Bytes of the actor's: parameters 2, states 4, gradients 2. The reference's are its own."""
    key, kl = "fsdp_config.model_dtype=bf16", "actor_rollout_ref.actor.use_kl_loss=True"
    half = plan(f"actor_rollout_ref.actor.{key}", kl)
    weights = {name: part / half.shard for name, part in half.updating().items()}
    assert [weights[n] for n in ("parameters", "optimizer", "gradients")] == [2, 4, 2]
    assert weights["reference"] == 4
    assert plan(f"actor_rollout_ref.ref.{key}", kl).resting()["reference"] == 2 * half.shard


def test_the_inputs_of_layers_move_to_the_host() -> None:
    four = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"
    here, away = plan(four), plan(four, "actor_rollout_ref.model.enable_activation_offload=True")
    inputs = 4 * 9216 * 28 * 2 * 3584
    assert here.activations() - away.activations() == inputs
    assert away.host()["offloaded activations"] == 4 * inputs
    assert "offloaded activations" not in here.host()


def test_the_cache_gets_what_vllms_share_leaves() -> None:
    """2 · 28 layers · 4 heads · 128 · 2 bytes a token; two devices hold half of it each."""
    one, two = plan(), plan("actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    assert one.kv_token == 57_344 and two.kv_token == 28_672
    assert sum(one.generating().values()) == pytest.approx(0.8 * 79 * GIB)
    assert two.generating()["engine's weights"] == one.generating()["engine's weights"] / 2


def test_checkpointing_keeps_a_layers_input_alone() -> None:
    with_, without = plan(), plan("actor_rollout_ref.model.enable_gradient_checkpointing=False")
    # per token: norms (4+4)·2·3584, attention 2·(2·3584+2·512), feed-forward 4·2·18944
    layer = 9216 * (16 * 3584 + 2 * (2 * 3584 + 2 * 512) + 8 * 18944)
    kept = 27 * layer - 28 * 9216 * 2 * 3584
    # Without, the head is fuller than a layer's backward pass: logits 10 · 2²⁵, weight and its
    # gradient 6 · 152064 · 3584; three of a layer's inner tensors, the weight's gradient, a layer.
    kept += 10 * 2**25 + (6 - 2) * 152064 * 3584 - 6 * (9216 * 18944 + 233_057_792)
    assert without.activations() - with_.activations() == pytest.approx(kept)


def test_activations_grow_with_the_micro_batch() -> None:
    dynamic = ["actor_rollout_ref.actor.use_dynamic_bsz=True"]
    key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    assert plan(*dynamic, f"{key}=18432").tokens == 18432
    assert plan("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3").tokens == 3 * 9216


def test_ranks_that_split_sequences_share_the_activations() -> None:
    """With twice as many ranks as heads of keys each rank keeps a head of keys and values that was
    the half of one; all keep what the exchange after the attention makes, 2 bytes · 3584 a token.
    """
    key, full = (
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
        "trainer.n_gpus_per_node=8",
    )
    without = "actor_rollout_ref.model.enable_gradient_checkpointing=False"
    model = QWEN_7B | dict(num_attention_heads=32, num_key_value_heads=4, head_dim=112)
    one, two, eight = (plan(full, without, f"{key}={n}", model=model) for n in (1, 2, 8))
    assert (one.tokens, two.tokens, eight.tokens) == (9216, 4608, 1152)
    assert two.parameters == one.parameters and two.shard == one.shard
    same = dict(ppo_max_token_len_per_gpu=9216)  # tokens of a rank
    fields = [f"actor_rollout_ref.actor.{k}={v}" for k, v in same.items()]
    fields += ["actor_rollout_ref.actor.use_dynamic_bsz=True", full, without]
    one, two, eight = (plan(*fields, f"{key}={n}", model=model) for n in (1, 2, 8))
    exchange, keys = 28 * 9216 * 2 * 3584, 28 * 9216 * 2 * 2 * 4 * 112
    assert two.activations() == one.activations() + exchange
    assert eight.activations() == one.activations() + exchange + keys


def test_long_sequences_fit_when_ranks_split_them() -> None:
    """131,072 tokens of a response: their activations fill a GPU, with checkpoints, too."""
    long = [*OFFLOAD, "data.max_response_length=131072", "trainer.n_gpus_per_node=8"]
    long += ["actor_rollout_ref.rollout.max_num_seqs=16"]
    split = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    assert plan(*long).verdict().endswith(f"does not fit (train); it would with {split}")
    assert plan(*long, split).fits()
    long.append("actor_rollout_ref.actor.use_dynamic_bsz=True")
    budget = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=66048"  # a half of one
    assert plan(*long).verdict().endswith(f"it would with {budget} {split}")
    assert plan(*long, budget, split).fits()


def test_lora_holds_gradients_and_states_of_its_products_alone() -> None:
    """Of rank r a layer of n×m has r·(n + m) more: attention 4·3584 + 2·(512 + 3584), feed-forward
    3·(18944 + 3584), 28 times; three of seven where only queries, keys and values are chosen."""
    on, one = "actor_rollout_ref.model.lora_rank=32", "trainer.n_gpus_per_node=1"
    kl = "actor_rollout_ref.actor.use_kl_loss=True"
    lora, dense = plan(on, one, kl), plan(one, kl)
    assert lora.trainable == 28 * 32 * (4 * 3584 + 2 * 4096 + 3 * 22528) == 80_740_352
    assert dense.trainable == dense.parameters == lora.parameters
    parts = lora.training()
    assert parts["optimizer"] == 2 * parts["gradients"] == 8 * lora.trainable
    assert parts["parameters"] == 4 * (lora.parameters + lora.trainable)
    assert parts["reference"] == 0 < dense.training()["reference"]  # it is the frozen model
    # Neither the head's gradient nor, at the end, the embeddings'.
    assert lora.activations() < dense.activations() - 4 * 152064 * 3584
    names = "actor_rollout_ref.model.target_modules="
    chosen = [f"{names}[q_proj,k_proj,v_proj]", f"{names}'.*self_attn\\.[qkv]_proj'"]
    chosen += ["actor_rollout_ref.model.exclude_modules='.*(o|gate|up|down)_proj'"]
    for keys in chosen:
        assert plan(on, keys).trainable == 28 * 32 * (2 * 3584 + 2 * 4096)


def test_a_3b_script_with_lora_fits_one_gpu_of_24_gb(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B))
    script = ROOT / "train_scripts/countdown-3b-delta-l-norm-alpha-1.sh"
    env = {"MODEL_PATH": str(tmp_path), "N_GPUS": "1", "GPU_GB": "24", "DRY_RUN": "1"}
    env |= {"PYTHON": warm_python(), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    found = []
    for rank in (0, 32):
        command = ["bash", str(script), f"actor_rollout_ref.model.lora_rank={rank}"]
        command.append("actor_rollout_ref.rollout.enforce_eager=True")
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(done.stderr)
    dense, lora = found
    assert "3.09 billion parameters, 24 GiB (GPU_GB=24)" in dense and "it does not fit" in dense
    assert "it fits" in lora
    assert "LoRA trains 59.9 million of them" in lora, lora


def test_the_smallest_change_that_fits_is_named() -> None:
    assert plan(*OFFLOAD).verdict().startswith("it fits; most is needed in 'generate': ")
    # 21 GiB of parameters and optimizer stay beside vLLM's 63 GiB of 79: one of the two must go.
    key = "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True"
    assert plan().verdict() == f"it does not fit (generate); it would with {key}"
    larger = QWEN_7B | dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80)
    larger |= dict(num_attention_heads=64, num_key_value_heads=8)
    assert plan(model=larger).verdict().endswith("take more devices, or a smaller model")


def test_a_resumed_rank_holds_states_and_gradients_while_engines_sleep() -> None:
    """fp32 weights, gradients, two moments; the embeddings came whole."""
    need = (4 + 4 + 8) * plan().shard + 4 * 152064 * 3584 + memory_plan.CONTEXT
    assert sum(plan().resuming().values()) == need
    resume = plan().phases()["resume"]
    assert sum(resume.values()) == need + memory_plan.ASLEEP and "KV cache" not in resume


def test_graphs_stay_while_the_engine_sleeps() -> None:
    eager, graphs = plan(), plan("actor_rollout_ref.rollout.enforce_eager=False")
    for phase, parts in eager.phases().items():
        assert sum(graphs.phases()[phase].values()) == sum(parts.values()) + memory_plan.GRAPHS


def test_the_host_must_hold_what_is_offloaded() -> None:
    """12 bytes of each parameter of four shards, and 2 GiB a process; less at the start, when a
    parameter takes 4 to be loaded and 4 in a shard, with eight bytes more for four hf engines."""
    need = 12 * plan().parameters + 8 * 2 * GIB
    assert sum(plan(*OFFLOAD).host().values()) == pytest.approx(need, rel=1e-3)
    assert plan(*OFFLOAD, host_memory=1.01 * need).fits()
    assert plan(*OFFLOAD, host_memory=0.99 * need).verdict().startswith("it does not fit")
    hf = plan(*OFFLOAD, "actor_rollout_ref.rollout.name=hf").host()
    assert hf["engines load it"] == 4 * 2 * plan().parameters  # bf16


def test_a_gpu_without_room_for_one_sequence_does_not_fit() -> None:
    tight = plan(*OFFLOAD, "actor_rollout_ref.rollout.gpu_memory_utilization=0.2")
    assert sum(tight.generating().values()) < 79 * GIB and not tight.fits()


def test_split_engines_share_no_gpu() -> None:
    split = plan("trainer.rollout_gpus_per_node=2").phases()
    assert "optimizer" not in split["generate, engine"]
    assert "KV cache" not in split["train"]


def test_a_cpu_holds_everything_at_once() -> None:
    cpu = plan("trainer.device=cpu", device="cpu")
    machine = cpu.phases()["machine"]
    assert machine["ranks' optimizer"] == 4 * 8 * cpu.shard
    assert machine["engine's weights"] == 4 * 4 * cpu.parameters  # fp32, four engines


def test_sizes_of_buffers_are_those_of_the_code() -> None:
    tiles = {device: default_tile(torch.device(device)) for device in ("cpu", "cuda")}
    assert {device: rows * width for device, (rows, width) in tiles.items()} == memory_plan.LOGITS
    assert memory_plan.CHUNK == CHUNK_BYTES
    assert memory_plan.REORDERED_FROM == REORDERED_FROM


@needs_onednn
@pytest.mark.parametrize(
    "tied, hidden, copied",
    [
        (True, 64, 2 * 2 + 1),  # of two layers' MLP, two weights of which are joined, and the head
        (False, 64, 2 * 2 + 1),
        (False, 1024, 2 * 3 + 1),  # also queries with keys and values, which alone are small
    ],
)
def test_an_hf_engine_on_a_cpu_holds_large_weights_twice(
    tied: bool, hidden: int, copied: int, tmp_path: Path
) -> None:
    shape = dict(vocab_size=2048, intermediate_size=2048, tie_word_embeddings=tied)
    shape |= dict(hidden_size=hidden)
    folder = make_tiny_model(tmp_path / "model", **shape)
    engine = HFEngine()
    engine.build(ModelConfig(path=str(folder)), RolloutConfig(), "cpu", 100)
    copies = [linear.product.keywords["W"] for linear in engine.linears]
    assert len(copies) == copied
    held = sum(4 * w.numel() for w in [*copies, *engine.model.parameters()])
    model = json.loads((folder / "config.json").read_text())
    hf = plan("actor_rollout_ref.rollout.name=hf", model=model, device="cpu").generating()
    assert hf["engine's weights"] == held


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_torch_holds(ranks: int, tmp_path: Path) -> None:
    """Sizes that two ranks can't divide: 113 words, 97 wide."""
    folder = make_tiny_model(tmp_path / "model", intermediate_size=97, vocab_size=113)
    mp.spawn(_update, (ranks, free_address(), folder, tmp_path), nprocs=ranks)
    model = json.loads((folder / "config.json").read_text())
    parts = plan(f"trainer.n_gpus_per_node={ranks}", model=model, device="cpu").training()
    held = json.loads((tmp_path / "held.json").read_text())
    assert {name: parts[name] for name in held} == held


def _update(rank: int, world: int, address: str, folder: Path, out: Path) -> None:
    """Writes the bytes that rank 0 holds after an update."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    config = ModelConfig(str(folder))
    policy = PolicyWorker("cpu")
    policy.build(config, FSDPConfig(), OptimConfig(), total_steps=1)
    step, limit = make_step(make_samples([4, 6])), MicroBatchLimit(2)
    policy.update([step], LossConfig(), limit, 1.0)
    policy.accumulate_gradient(step, LossConfig(), limit)
    parameters = list(policy.model.parameters())
    states = policy.optimizers[0].state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    held = {"parameters": parameters, "optimizer": moments}
    held |= {"gradients": [p.grad for p in parameters]}
    if rank == 0:
        sizes = {name: sum(t.to_local().nbytes for t in held[name]) for name in held}
        (out / "held.json").write_text(json.dumps(sizes))
    dist.destroy_process_group()


def started(module: str, *arguments: str, given: str = "") -> tuple[str, str]:
    """Standard output and standard error of `python -m`, with torch forbidden and DRY_RUN=1."""
    code = "import sys; sys.modules['torch'] = None; import runpy; "
    code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *arguments]
    env = {"DRY_RUN": "1", "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": "/nowhere", "PATH": ""}
    done = subprocess.run(command, env=env, input=given, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def dry_run(*overrides: str) -> tuple[str, str]:
    return started("verl.trainer.main_ppo", *BASE, *overrides)


def test_dry_run_estimates_on_standard_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    out, err = dry_run(f"actor_rollout_ref.model.path={tmp_path}", *OFFLOAD)
    assert out.startswith("data:") and "memory" not in out.replace("gpu_memory", "")
    assert "7.62 billion parameters, 79 GiB (no GPU is visible: 80 GB are assumed; " in err
    assert "it fits; most is needed in" in err
    (tmp_path / "resolved.yaml").write_text(out)
    for arguments, given in ([str(tmp_path / "resolved.yaml")], ""), ([], out):
        assert started("verl.tools.memory_plan", *arguments, given=given) == (err, "")


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {foo: 1}")
    for name, message in ("x.yaml", "Key 'foo' not in"), ("none.yaml", "No such file"):
        command = [warm_python(), "-m", "verl.tools.memory_plan", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_dry_run_without_the_model(tmp_path: Path) -> None:
    _, err = dry_run("actor_rollout_ref.model.path=someone/some-model")
    line = "memory estimate: it needs config.json of {}, which is not on this machine"
    hf = Path(sys.executable).with_name("hf")
    hub = line.format("someone/some-model") + f": {hf} download someone/some-model config.json"
    assert err.strip().splitlines()[-1] == hub
    _, err = dry_run("actor_rollout_ref.model.path=./nowhere")
    assert err.strip().splitlines()[-1] == line.format("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    _, err = dry_run(f"actor_rollout_ref.model.path={tmp_path}")
    assert err.strip().splitlines()[-1].startswith("memory estimate: none for mamba models")
