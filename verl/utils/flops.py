"""Floating-point operations of an update, and how many a GPU does at most, for `perf/mfu`."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What decides the operations of a decoder: its matrix products."""

    decoder: int  # weights of all linear layers before the head
    head: int  # weights of the head: vocabulary × hidden
    attention: int  # layers × heads × size of a head
    per_weight: int = 6  # operations for each weight and token; 4 where weights are frozen


def head_size(config: Any) -> int:
    """Of an attention head, from the Hugging Face configuration of a text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def update_flops(size: ModelSize, prompts: ArrayLike, responses: ArrayLike) -> float:
    """Of a forward and a backward pass over sequences of these lengths in tokens, [N]: of a matrix
    product 2 for each weight and token, and twice that backwards (once where weights are frozen).
    T = P + R − 1 tokens go through the decoder, R hidden states through the head; each causal pair
    has a key and a value. Other operations are not counted: 6·decoder·T + 6·head·R +
    12·attention·T(T+1)/2."""
    R = np.asarray(responses, np.float64)
    T = np.asarray(prompts, np.float64) + R - 1
    pairs = T * (T + 1) / 2
    products = size.per_weight * (size.decoder * T + size.head * R)
    return float((products + 12 * size.attention * pairs).sum())


AMPERE = {"A10": 125, "A40": 150, "A100": 312, "A800": 312, "RTX 3090": 71}
ADA = {"L4": 121, "L40": 181, "L40S": 362, "RTX 4090": 165}
HOPPER = {"H20": 148, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835}
HOPPER |= {"H800": 989, "H800 PCIe": 756}
PEAK_TFLOPS = AMPERE | ADA | HOPPER | {"B200": 2250}
"""Part of what CUDA calls a GPU → dense bfloat16 products with float32 sums, 10^12 operations a
second: NVIDIA's data sheets, which print twice as much "with sparsity" for those since A100."""


def gpu_peak_flops(name: str) -> float | None:
    """Operations a second, at most, of a GPU that CUDA calls `name`; None if that isn't known."""
    if re.search(r"\b(MIG|Laptop|Ti|D|Max-Q)\b", name):  # a part, or another one
        return None
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None
