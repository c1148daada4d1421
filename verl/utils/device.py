"""The only place that asks "GPU or CPU?"."""

from __future__ import annotations

import torch


def get_device(name: str | None = None) -> torch.device:
    """The device of this process: `name`, or cuda where there is a GPU, else cpu."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def process_group_backend(device: torch.device) -> str:
    """torch.distributed backend for tensors on `device`; host tensors always go through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def default_dtype(device: torch.device) -> str:
    """Type to compute in where the configuration names none."""
    return "bfloat16" if device.type == "cuda" else "float32"


def default_packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Key of `verl.models.packing.PACKED_ATTENTION`; the GPU's kernels are for 16-bit types."""
    return "packed_varlen" if device.type == "cuda" and dtype.itemsize == 2 else "packed_sdpa"


def worker_resources(device: str | None, share: float) -> dict[str, float]:
    """Ray resources of a worker that uses `share` of a device; one CPU each where there is no
    GPU in the cluster."""
    import ray

    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if (device or ("cuda" if has_gpu else "cpu")) == "cuda":
        return {"num_gpus": share, "num_cpus": 1}
    return {"num_cpus": 1}


def max_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def empty_cache(device: torch.device) -> None:
    """Returns cached device memory, so that another process on the same device can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
