"""FLOPs of an update: a number worked out by hand, and what torch counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.helpers import make_samples, make_step
from verl.models.hf import model_size
from verl.trainer.ppo.metrics import mfu_metrics
from verl.utils.device import memory_metrics, peak_flops
from verl.utils.flops import ModelSize, gpu_peak_flops, update_flops

TINY = dict(
    model_type="qwen2",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
)
"""Weights of a layer's products: 32·32 + 16·32 + 16·32 + 32·32 + 3·48·32 = 7,680."""


def size(**changes: int | bool) -> ModelSize | None:
    """Of a Qwen2 without memory for its weights."""
    with torch.device("meta"):
        return model_size(Qwen2ForCausalLM(Qwen2Config(**TINY | changes)))


def test_by_hand() -> None:
    """One layer of width 2 has 4 products with 2·2 weights and 3 with 2·2, so 28; P = 1 and R = 2:
    6·28·2 for two tokens, 6·(5·2)·2 for two predictions, 12·2·(1 + 2) for three causal pairs."""
    model = dict(hidden_size=2, intermediate_size=2, num_hidden_layers=1, vocab_size=5)
    model |= dict(num_attention_heads=1, num_key_value_heads=1)
    assert size(**model) == ModelSize(decoder=28, head=10, attention=2)
    # Tied or not, the head is a product.
    assert size(**model, tie_word_embeddings=True) == size(**model)
    assert update_flops(size(**model), [1], [2]) == 336 + 120 + 72
    assert update_flops(size(**model), [1, 1], [2, 2]) == 2 * 528


def test_a_large_model_by_hand() -> None:
    """Qwen2.5-3B: 36 layers of 2·2048² + 2·256·2048 + 3·11008·2048 weights, and a head of
    151936·2048. One sequence of 1,024 + 4,097 tokens, 5,120 of which go through the layers."""
    model = dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36)
    model |= dict(num_attention_heads=16, num_key_value_heads=2, vocab_size=151936)
    layers = 36 * (2 * 2048**2 + 2 * 256 * 2048 + 3 * 11008 * 2048)
    assert layers == 2_774_532_096  # the card's 2.77 billion without embedding
    head, pairs = 6 * 151936 * 2048 * 4097, 5120 * 5121 // 2
    expected = 6 * layers * 5120 + head + 12 * 36 * 2048 * pairs
    assert update_flops(size(**model), [1024], [4097]) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_torch_counts_but_for_the_pairs_that_a_mask_hides(tied: bool) -> None:
    config = Qwen2Config(**TINY, tie_word_embeddings=tied, attn_implementation="eager")
    lm = Qwen2ForCausalLM(config)
    P, R = 7, 9
    T = P + R - 1
    with FlopCounterMode(display=False) as counter:
        hidden = lm.model(torch.arange(T)[None], use_cache=False).last_hidden_state[0, P - 1 :]
        lm.lm_head(hidden).sum().backward()
    hidden_pairs = T * (T - 1) // 2  # eager attention computes them, too
    attention = 12 * 3 * 32 * hidden_pairs
    assert counter.get_total_flops() == update_flops(model_size(lm), [P], [R]) + attention


def test_mfu_is_the_share_of_what_could_have_been_computed() -> None:
    steps = [make_step(make_samples([2, 4])), make_step(make_samples([3]))]
    samples = [s for step in steps for s in step.samples]
    samples[1].loss_mask = np.array([True, False, True, True])  # reads four, predicts three
    lengths = [(s.num_tokens - s.length, s.length) for s in samples]
    flops = sum(update_flops(size(), [p], [r]) for p, r in lengths)
    metrics = mfu_metrics(size(), steps, seconds=2.0, peak=flops)
    assert metrics == {"perf/mfu": pytest.approx(0.5)}
    assert mfu_metrics(size(), steps, 2.0, None) == mfu_metrics(None, steps, 2.0, flops) == {}


def test_a_size_that_is_not_known() -> None:
    """Experts, which not every token goes through, and layers that are no `nn.Linear`."""
    config = MixtralConfig(**{k: v for k, v in TINY.items() if k != "model_type"})
    with torch.device("meta"):
        assert model_size(MixtralForCausalLM(config)) is None
        assert model_size(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A100X of tomorrow", None),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_peak_of_a_gpu(name: str, tflops: int | None) -> None:
    assert gpu_peak_flops(name) == (tflops and tflops * 1e12)


def test_what_a_cpu_says_of_itself() -> None:
    assert peak_flops(torch.device("cpu")) is None
    memory = memory_metrics(torch.device("cpu"))
    assert set(memory) == {"perf/max_memory_gb", "perf/cpu_memory_used_gb"}
    assert 0.05 < memory["perf/max_memory_gb"] < memory["perf/cpu_memory_used_gb"] * 2
