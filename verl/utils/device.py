"""The only place that asks "GPU or CPU?"."""

import resource
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist

from verl.utils.flops import gpu_peak_flops, head_size

VLLM_CPU_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU


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
    # Any: torch's stubs don't know that the last argument, a time limit, has a default.
    backend: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
    return backend(store, rank, world_size)


def kv_cache_bytes(
    device: torch.device, config: Any, dtype: str, longest: int, sequences: int
) -> int | None:
    """vLLM's `kv_cache_memory_bytes` for so many sequences of `longest` tokens: 5 % of the memory
    at most. None on a GPU, where `gpu_memory_utilization` decides."""
    if device.type == "cuda":
        return None
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    values = config.num_hidden_layers * heads * head_size(config)
    token_bytes = 2 * values * getattr(torch, dtype).itemsize
    blocks = sequences * -(-longest // VLLM_CPU_BLOCK) + 1  # vLLM keeps one for itself
    return min(token_bytes * blocks * VLLM_CPU_BLOCK, psutil.virtual_memory().total // 20)


def default_dtype(device: torch.device) -> str:
    """Type to compute in where the configuration names none."""
    return "bfloat16" if device.type == "cuda" else "float32"


def default_packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Name of a function in `verl.models.packing`; the GPU's kernels are for 16-bit types."""
    return "packed_varlen" if device.type == "cuda" and dtype.itemsize == 2 else "packed_sdpa"


REORDERED_FROM = 2**17  # weights of so many elements are faster in oneDNN's order (LOG.md)


def multiplies_faster_reordered(weight: torch.Tensor) -> bool:
    """Whether `verl.models.hf` pays for this weight of a linear layer, and can be had."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    available = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return fits and weight.numel() >= REORDERED_FROM and available


def default_tile(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries whose logits exist at a time (`verl.models.logprobs`): few enough
    for a CPU's cache, enough for a GPU's kernels to take longer than their launches."""
    return (2048, 2**14 if device.type == "cuda" else 2**11)


def _uses_gpus(device: str | None) -> bool:
    """Whether workers with `trainer.device` get GPUs of the cluster."""
    import ray

    return (device or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")) == "cuda"


def worker_resources(device: str | None, share: float) -> dict[str, float]:
    """Ray resources of a worker that uses `share` of a device."""
    return {"num_cpus": 1} | ({"num_gpus": share} if _uses_gpus(device) else {})


def default_weight_transfer(device: str | None, supported: Sequence[str], split: bool) -> str:
    """The fastest transfer that the engine supports; `split`: it has devices of its own."""
    fastest = "nccl" if split else "ipc"
    return fastest if _uses_gpus(device) and fastest in supported else "host"


def memory_metrics(device: torch.device) -> dict[str, float]:
    """`perf/*_gb` of docs/metrics.md, in GiB: peaks of this process, and the machine's use now."""
    peaks = {"max_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["max_memory"] = torch.cuda.max_memory_allocated(device)
        peaks["max_memory_allocated"] = peaks["max_memory"]
        peaks["max_memory_reserved"] = torch.cuda.max_memory_reserved(device)
    figures = peaks | {"cpu_memory_used": psutil.virtual_memory().used}
    return {f"perf/{name}_gb": value / 2**30 for name, value in figures.items()}


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a GPU can do at most; None if that isn't known, as of a CPU."""
    return gpu_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def empty_cache(device: torch.device) -> None:
    """Returns cached device memory, so that another process on the same device can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
