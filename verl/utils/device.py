"""The only place that asks "GPU or CPU?"."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import torch
import torch.distributed as dist

VLLM_CPU_BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""


def get_device(name: str | None = None) -> torch.device:
    """The device of this process: `name`, or cuda where there is a GPU, else cpu."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def process_group_backend(device: torch.device) -> str:
    """torch.distributed backend for tensors on `device`; host tensors always go through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def broadcast_group(device: torch.device, address: str, rank: int, world_size: int) -> Any:
    """A process group for `broadcast(tensor, 0)` of tensors on `device`, apart from the default one
    and from its ranks. It meets at `address` (`tcp://host:port`), where rank 0 is."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    store = dist.TCPStore(host, int(port), world_size, is_master=rank == 0)
    if device.type == "cuda":
        return dist.ProcessGroupNCCL(store, rank, world_size)
    return dist.ProcessGroupGloo(store, rank, world_size)


def kv_cache_bytes(
    device: torch.device, config: Any, dtype: str, longest: int, sequences: int
) -> int | None:
    """vLLM's `kv_cache_memory_bytes` for so many sequences, of `longest` tokens each, of a Hugging
    Face model: 5 % of the memory at most. None on a GPU, where `gpu_memory_utilization` decides."""
    if device.type == "cuda":
        return None
    import psutil

    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * getattr(torch, dtype).itemsize
    blocks = sequences * -(-longest // VLLM_CPU_BLOCK) + 1  # vLLM keeps one for itself
    return min(token * blocks * VLLM_CPU_BLOCK, psutil.virtual_memory().total // 20)


def default_dtype(device: torch.device) -> str:
    """Type to compute in where the configuration names none."""
    return "bfloat16" if device.type == "cuda" else "float32"


def default_packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Key of `verl.models.packing.PACKED_ATTENTION`; the GPU's kernels are for 16-bit types."""
    return "packed_varlen" if device.type == "cuda" and dtype.itemsize == 2 else "packed_sdpa"


REORDERED_FROM = 2**17
"""Elements from which on a weight multiplies faster as oneDNN orders it: its calls take about 10 µs
more than PyTorch's (two cores of an AMD EPYC, benchmarks/LOG.md)."""


def multiplies_faster_reordered(weight: torch.Tensor) -> bool:
    """Whether `verl.models.onednn` pays for this weight of a linear layer, and can be had."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    there = torch.backends.mkldnn.is_available()
    there = there and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return fits and weight.numel() >= REORDERED_FROM and there


def default_tile(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries whose logits exist at a time (`verl.models.logprobs`): on a CPU
    so few that they stay in its cache between the steps on them, on a GPU so many that its kernels
    take longer than their launches. Every matrix product is large in all directions."""
    return (2048, 2**14 if device.type == "cuda" else 2**11)


def _uses_gpus(device: str | None) -> bool:
    """Whether workers with `trainer.device` get GPUs of the cluster."""
    import ray

    return (device or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")) == "cuda"


def worker_resources(device: str | None, share: float) -> dict[str, float]:
    """Ray resources of a worker that uses `share` of a device; one CPU each where there is no
    GPU in the cluster."""
    return {"num_cpus": 1} | ({"num_gpus": share} if _uses_gpus(device) else {})


def default_weight_transfer(device: str | None, engine: str, split: bool) -> str:
    """A way of `verl.workers.weight_sync`; `split`: actor and engines have devices of their own."""
    if engine == "hf" or not _uses_gpus(device):
        return "host"
    return "nccl" if split else "ipc"


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory in GiB, under verl's names: ``perf/max_memory_gb``, the peak of this process
    (allocated on the GPU, or resident on the host), on a GPU also as
    ``perf/max_memory_allocated_gb`` beside ``perf/max_memory_reserved_gb``, what PyTorch has taken
    for it; and ``perf/cpu_memory_used_gb``, what all processes of the machine use now."""
    import resource

    import psutil

    peaks = {"max_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        peaks = {
            "max_memory": allocated,
            "max_memory_allocated": allocated,
            "max_memory_reserved": reserved,
        }
    figures = peaks | {"cpu_memory_used": psutil.virtual_memory().used}
    return {f"perf/{name}_gb": value / 2**30 for name, value in figures.items()}


PEAK_TFLOPS = {
    "A10": 125,
    "A40": 150,
    "A100": 312,
    "A800": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "H20": 148,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H800 PCIe": 756,
    "H200": 989,
    "H200 NVL": 835,
    "B200": 2250,
}
"""Dense bfloat16 products with float32 sums, in 10^12 operations a second, from NVIDIA's data
sheets of each GPU, which print twice as much "with sparsity" for those since A100. The names are
parts of what CUDA calls the GPU."""


def gpu_peak_tflops(name: str) -> float | None:
    """The entry of `PEAK_TFLOPS` for a GPU that CUDA calls `name`; None if there is none."""
    if re.search(r"\b(MIG|Laptop|Ti|D|Max-Q)\b", name):  # a part, or another one
        return None
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def peak_flops(device: torch.device, seconds: float = 0.1) -> float | None:
    """Operations a second that `device` can do at most: of a GPU those of `PEAK_TFLOPS`, None for
    one that isn't there. A CPU has no such sheet: there it is the best of the products of two
    512×512 float32 matrices that this process's threads make in `seconds`."""
    if device.type == "cuda":
        tflops = gpu_peak_tflops(torch.cuda.get_device_name(device))
        return tflops and tflops * 1e12
    n, best, start = 512, math.inf, time.perf_counter()
    a, result = torch.rand(n, n), torch.empty(n, n)
    while (before := time.perf_counter()) - start < seconds:
        torch.mm(a, a, out=result)
        best = min(best, time.perf_counter() - before)
    return 2 * n**3 / best


def empty_cache(device: torch.device) -> None:
    """Returns cached device memory, so that another process on the same device can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
