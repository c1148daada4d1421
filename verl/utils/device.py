"""The only place that asks "GPU or CPU?"."""

import os
import resource
import shutil
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist

from verl.utils.flops import gpu_peak_flops, head_size

VLLM_CPU_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU


def cluster_device(name: str | None) -> str:
    """What `trainer.device` stands for: `name`, or cuda if Ray's cluster has GPUs, else cpu."""
    import ray

    return name or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")


def get_device(name: str) -> torch.device:
    """The device of a worker. Raises: ValueError, with torch's reason, for a GPU it can't use."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            remedy = "python -m verl.tools.preflight tells more; trainer.device=cpu needs no GPU"
            raise ValueError(f"PyTorch can't use the GPU: {error} ({remedy})") from None
    return device


def forbid_expandable_segments() -> None:
    """Of PyTorch's allocator, before it is used: their CUDA IPC handles need a system call that
    containers often lack (pidfd_getfd)."""
    for name in {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        options = os.environ[name].split(",")
        os.environ[name] = ",".join(o for o in options if "expandable_segments" not in o)


def process_group_backend(device: torch.device) -> str:
    """torch.distributed backend for tensors on `device`; host tensors always go through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def broadcast_group(
    device: torch.device, address: str, rank: int, world_size: int, timeout: timedelta | None = None
) -> Any:
    """A process group for `broadcast(tensor, 0)` of tensors on `device`, apart from the default one
    and from its ranks. It meets at `address` (`tcp://host:port`), where rank 0 is."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    store = dist.TCPStore(host, int(port), world_size, is_master=rank == 0)
    # Any: torch's stubs don't know that the last argument, a time limit, has a default.
    backend: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
    return backend(store, rank, world_size, *([timeout] if timeout else []))


def kv_cache_bytes(
    device: str, config: Any, dtype: str, longest: int, sequences: int
) -> int | None:
    """vLLM's `kv_cache_memory_bytes` for so many sequences of `longest` tokens: 5 % of the memory
    at most. None on a GPU, where `gpu_memory_utilization` decides."""
    if device == "cuda":
        return None
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    values = config.num_hidden_layers * heads * head_size(config)
    token_bytes = 2 * values * getattr(torch, dtype).itemsize
    blocks = sequences * -(-longest // VLLM_CPU_BLOCK) + 1  # vLLM keeps one for itself
    return min(token_bytes * blocks * VLLM_CPU_BLOCK, psutil.virtual_memory().total // 20)


def default_dtype(device: str) -> str:
    """Type to compute in where the configuration names none."""
    return "bfloat16" if device == "cuda" else "float32"


def adamw(parameters: Any, lr: float, eps: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW; on a GPU in one kernel, whose work needs no memory."""
    return torch.optim.AdamW(parameters, lr, eps=eps, fused=device.type == "cuda" or None)


def saved_on_host(device: torch.device) -> Callable[[], Any]:
    """Makes contexts in which what a backward pass needs is kept in host memory."""
    return partial(torch.autograd.graph.save_on_cpu, pin_memory=device.type == "cuda")


def be_deterministic() -> None:
    """From now on, kernels of this process that give the same result every time; PyTorch warns of
    those that it lacks. Before a GPU is used: cuBLAS reads its variable then (its documentation,
    "Results reproducibility")."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # of transformers
    torch.use_deterministic_algorithms(True, warn_only=True)


def default_packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Name of an attention for packed sequences: FlashAttention 3 where it is installed on a Hopper
    GPU, else of `verl.models.packing`. The GPU's kernels are for 16-bit types."""
    from transformers.utils import is_flash_attn_3_available

    if device.type != "cuda" or dtype.itemsize != 2:
        return "packed_attention"
    if is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9:
        return "flash_attention_3"
    return "packed_varlen"


REORDERED_FROM = 2**17  # weights of so many elements are faster in oneDNN's order (LOG.md)


def multiplies_faster_reordered(*weights: torch.Tensor) -> bool:
    """Whether `verl.models.linears` pays for these weights, together, and can be had."""
    fits = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
    available = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return fits and sum(w.numel() for w in weights) >= REORDERED_FROM and available


def compiler_available() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def default_tile(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries whose logits exist at a time (`verl.models.logprobs`): few enough
    for a CPU's cache, enough for a GPU's kernels to take longer than their launches."""
    return (2048, 2**14 if device.type == "cuda" else 2**11)


def worker_resources(device: str, share: float) -> dict[str, float]:
    """Ray resources of a worker that uses `share` of a device."""
    return {"num_cpus": 1} | ({"num_gpus": share} if device == "cuda" else {})


def default_weight_transfer(device: str, supported: Sequence[str], split: bool) -> str:
    """The fastest transfer that the engine supports; `split`: it has devices of its own."""
    fastest = "nccl" if split else "ipc"
    return fastest if device == "cuda" and fastest in supported else "host"


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


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, [M, K] and [K, N], kept in float32 where they are of 16 bits."""
    if a.device.type == "cuda" and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def empty_cache(device: torch.device) -> None:
    """Returns cached device memory, so that another process on the same device can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
