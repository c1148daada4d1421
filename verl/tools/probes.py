"""What a run on this machine needs, tried out: `python -m verl.tools.probes NAME DEVICE` does one
such thing and prints what it found as its last line. `verl.tools.preflight` starts each in a
process of its own, so that one that hangs or crashes is a line of its report. All run on CPUs, too.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

GIB = 2**30
CACHE = GIB // 4  # bytes of the KV cache
NUMBERS = 1000  # of the tensors that processes exchange


def torch_facts(device: str) -> str:
    """JSON: torch's release, its CUDA, and the GPUs that compute; or torch's reason why none does.
    Raises: RuntimeError if a GPU is there and computes nothing."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"available": device == "cuda" and torch.cuda.is_available(), "gpus": []}
    if facts["available"]:
        for i in range(torch.cuda.device_count()):
            if torch.ones(NUMBERS, device=f"cuda:{i}").sum().item() != NUMBERS:
                raise RuntimeError(f"cuda:{i} computes wrong sums")
            capability = "{}.{}".format(*torch.cuda.get_device_capability(i))
            facts["gpus"].append(f"{torch.cuda.get_device_name(i)} ({capability})")
    elif device == "cuda":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the latter without CUDA in the wheel
            facts["reason"] = str(error)
    return json.dumps(facts)


def _add_one(rebuild: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float:
    """In another process: changes the tensor, and returns the sum that it found."""
    tensor = rebuild(*arguments)
    found: float = tensor.sum().item()
    tensor += 1
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return found


def share_tensor(device: str) -> str:
    """A tensor that a second process on the same device reads and changes: CUDA IPC, by the same
    call as `verl.models.policy`. Raises: RuntimeError if one doesn't see what the other wrote."""
    from torch.multiprocessing.reductions import reduce_tensor

    tensor = torch.arange(NUMBERS, dtype=torch.float32, device=device)
    expected = [tensor.sum().item(), tensor.sum().item() + NUMBERS]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(_add_one, *reduce_tensor(tensor)).result(), tensor.sum().item()]
    if found != expected:
        raise RuntimeError(f"the processes read sums of {found}, not {expected}")
    return "a second process reads and changes a tensor of the first"


def _add_up(rank: int, ranks: int, meeting: str, device: str) -> None:
    """Rank `rank` of an all-reduce. As the trainer's workers, it sees no GPU but its own."""
    from verl.utils.device import process_group_backend

    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank].strip()
    backend = process_group_backend(torch.device(device))
    dist.init_process_group(backend, meeting, rank=rank, world_size=ranks)
    value = torch.full((2**20,), rank + 1.0, device=device)
    dist.all_reduce(value)
    expected = ranks * (ranks + 1) / 2
    if not bool((value == expected).all()):
        raise RuntimeError(f"rank {rank} of {ranks} has {value[0].item()}, not {expected}")
    dist.destroy_process_group()


def all_reduce(device: str) -> str:
    """A sum over one process for each GPU; on a CPU over two. Raises: RuntimeError if a rank's is
    wrong."""
    ranks = torch.cuda.device_count() if device == "cuda" else 2
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        torch.multiprocessing.spawn(_add_up, (ranks, meeting, device), nprocs=ranks)
    return f"{'NCCL' if device == 'cuda' else 'gloo'} adds up over {ranks} process(es)"


def attention(device: str) -> str:
    """The packed attention that an update takes on this device (`verl.models.packing`), and its
    gradients, against SDPA on padded sequences in fp32. Raises: RuntimeError if they differ by more
    than the rounding of its type."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from torch.nn.utils.rnn import pad_sequence
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from verl.models.packing import sequence_kwargs
    from verl.utils.device import default_dtype, default_packed_attention

    at, dtype = torch.device(device), getattr(torch, default_dtype(device))
    name = default_packed_attention(at, dtype)
    lengths, heads, groups, size = [1, 70, 200, 33], 4, 2, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), size) for h in (heads, groups, groups)]
    given = [torch.randn(s, generator=generator).to(at, dtype).requires_grad_() for s in shapes]
    module: Any = torch.nn.Module()  # as transformers' FlashAttention looks at it
    module.is_causal, module.config = True, SimpleNamespace(_attn_implementation=name)
    kwargs = sequence_kwargs(lengths, at)
    output = ALL_ATTENTION_FUNCTIONS[name](module, *given, **kwargs)[0]  # [1, T, heads, size]

    exact = [x.detach().float().requires_grad_() for x in given]
    q, k, v = (  # [sequences, heads, W, size]
        pad_sequence(x[0].transpose(0, 1).split(lengths), batch_first=True).transpose(1, 2)
        for x in exact
    )
    padded = sdpa(q, k, v, is_causal=True, enable_gqa=True)  # pads come after all that count
    expected = torch.cat([p[:, :n] for p, n in zip(padded, lengths, strict=True)], 1)
    expected = expected.transpose(0, 1)[None]
    direction = torch.randn(expected.shape, generator=generator).to(at)
    pairs = [(output, expected)]
    grads = (
        torch.autograd.grad((y.float() * direction).sum(), x)
        for y, x in ((output, given), (expected, exact))
    )
    pairs += zip(*grads, strict=True)
    worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
    limit = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    if not worst <= limit:
        raise RuntimeError(f"{name} differs from SDPA by {worst:.1e} of the norm, over {limit:.1e}")
    return f"{name} is SDPA but for {worst:.0e} of the norm"


def make_model(folder: Path) -> dict[str, Tensor]:
    """Saves a random Llama of two layers with a tokenizer of a few words; returns its weights."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<eos>", *map(str, range(127))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def vllm_engine(device: str) -> str:
    """vLLM generates, sleeps, takes its weights again, and generates the same with the same
    seeds. Raises: RuntimeError if it doesn't, or frees less than half of its KV cache."""

    from verl.config.base import ModelConfig
    from verl.config.rollout import EngineKwargs, RolloutConfig
    from verl.protocol import Prompt, WeightChunk
    from verl.rollout.engine import SamplingParams
    from verl.rollout.vllm import VLLMEngine
    from verl.utils.device import default_dtype

    params = SamplingParams(n=1, max_tokens=16, ignore_eos=True)
    prompts = [Prompt(i, np.arange(3 + i, 12), "preflight", {}) for i in range(2)]
    with TemporaryDirectory() as folder:
        weights = make_model(Path(folder))
        engine = VLLMEngine()
        rollout = RolloutConfig(name="vllm", max_num_seqs=2, gpu_memory_utilization=0.1)
        kwargs = EngineKwargs(vllm={"kv_cache_memory_bytes": CACHE})
        engine.build(ModelConfig(path=folder), replace(rollout, engine_kwargs=kwargs), device, 64)

    def tokens() -> list[list[int]]:
        samples = engine.generate_all(prompts, [0, 1], params)
        return [s.response_ids.tolist() for s in sorted(samples, key=lambda s: s.group)]

    def free() -> int:
        return torch.cuda.mem_get_info()[0] if device == "cuda" else 0

    first, before = tokens(), free()
    engine.sleep()
    freed, sleeps = free() - before, engine.sleeps
    if device == "cuda" and not (sleeps and freed >= CACHE / 2):
        raise RuntimeError(f"asleep, the engine has freed {freed / GIB:.2f} GiB")
    dtype = default_dtype(device)
    tensors = [weight.to(getattr(torch, dtype)) for weight in weights.values()]
    engine.start_update()
    shapes = [list(t.shape) for t in tensors]
    engine.load_weights(WeightChunk(list(weights), dtype, shapes, tensors=tensors))
    engine.finish_update(1)
    if (second := tokens()) != first:
        raise RuntimeError(f"with the same weights anew it generates {second}, before {first}")
    slept = f"sleeps (frees {freed / GIB:.2f} GiB), wakes" if sleeps else "has no sleep here"
    return f"generates, {slept}, takes weights, generates the same"


PROBES = {
    "torch": torch_facts,
    "share": share_tensor,
    "all-reduce": all_reduce,
    "attention": attention,
    "vllm": vllm_engine,
}
"""Each takes `cpu` or `cuda`, and raises an error if what it tries doesn't work."""


if __name__ == "__main__":
    print("\n" + PROBES[sys.argv[1]](sys.argv[2]))
