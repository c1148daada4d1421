"""What the sections of `bare.py` share: models and samples made on the spot, clocks, memory."""
# ruff: noqa: E402  what a machine may lack is replaced before the project is imported

import gc
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch


def replace_missing() -> list[str]:
    """Gives the project what it needs of a package that isn't here; returns what was done."""
    try:
        import psutil  # noqa: F401
    except ImportError:
        module: Any = types.ModuleType("psutil")
        module.__spec__ = ModuleSpec("psutil", None)  # transformers looks for it
        module.virtual_memory = lambda: types.SimpleNamespace(**_host_memory())
        sys.modules["psutil"] = module
        return ["psutil is not installed: /proc/meminfo is read instead"]
    return []


def _host_memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    size = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    return {"total": size["MemTotal"], "used": size["MemTotal"] - size["MemAvailable"]}


NOTES = replace_missing()

from verl.config.base import FSDPConfig, ModelConfig, OptimConfig
from verl.config.schema import Config
from verl.models.policy import PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample
from verl.tools.memory_plan import Plan, changed
from verl.utils.device import empty_cache
from verl.utils.flops import ModelSize

QWEN_3B = dict(
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
)
TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=320,
)
UNUSED = 271  # entries of the 3B model's vocabulary that its tokenizer doesn't know
LOGITS_STD = 4.0  # of the random models: probabilities as uneven as those of a trained one
INITIAL_STD = 0.02
SIGMA = 1.05  # of the logarithm of a response's length


@dataclass
class Sizes:
    """How much is done; the defaults are for a GPU of 80 GB and 8 minutes."""

    model: dict[str, int] = field(default_factory=lambda: QWEN_3B)
    short: dict[str, int] = field(default_factory=lambda: QWEN_3B | {"num_hidden_layers": 4})
    checked: dict[str, int] = field(  # gradients are compared with it
        default_factory=lambda: dict(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=4096,
        )
    )
    responses: int = 32
    prompt: int = 128
    mean: int = 1024  # tokens of a response
    longest: int = 3900
    budgets: tuple[int, ...] = (16384, 8192, 4096)  # of a micro-batch, in tokens; all sequences fit
    repeats: int = 3
    rows: int = 4096  # of hidden states, for the head alone
    new_tokens: int = 256
    sequences: int = 64
    copied: int = 2**31  # bytes
    product: int = 8192  # rows and columns


def small_sizes() -> Sizes:
    """For a CPU in seconds."""
    few = {"responses": 6, "prompt": 5, "mean": 20, "longest": 60, "budgets": (128, 64)}
    rest = {"rows": 50, "new_tokens": 8, "sequences": 8, "copied": 2**22, "product": 128}
    return Sizes(TINY, TINY, TINY, repeats=1, **few, **rest)  # type: ignore[arg-type]


@dataclass
class Run:
    """One run of all sections."""

    device: torch.device
    sizes: Sizes
    folder: Path  # for models and checkpoints
    deadline: float  # of `time.monotonic`
    notes: list[str] = field(default_factory=lambda: list(NOTES))
    actor: PolicyWorker | None = None  # of `Sizes.model`, without offloading
    size: ModelSize | None = None  # of `actor`
    peak_flops: float | None = None  # by the card's data sheet
    measured_flops: float = 0.0  # of a large product of matrices
    attention: str | None = None  # instead of the usual one, where that fails

    @property
    def cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def model(self, name: str) -> Path:
        """The folder of a random model of these `Sizes`, made when it is first asked for."""
        folder = self.folder / name
        if not folder.exists():
            make_model(folder, getattr(self.sizes, name), self.device)
        return folder

    def get_actor(self) -> PolicyWorker:
        """The large model, built when it is first asked for."""
        if self.actor is None:
            self.actor, self.size = build(self, "model")
        return self.actor

    def free(self) -> None:
        """Gives back the memory of what nobody refers to."""
        gc.collect()
        empty_cache(self.device)


def build(run: Run, name: str, **options: Any) -> tuple[PolicyWorker, ModelSize | None]:
    """A policy with AdamW; `options`: those of `FSDPConfig`."""
    worker = PolicyWorker(run.device.type)
    model = ModelConfig(path=str(run.model(name)))
    size, run.peak_flops = worker.build(model, FSDPConfig(**options), OptimConfig(), 100)
    if run.attention:
        worker.model.lm.set_attn_implementation(run.attention)
    return worker, size


def make_model(folder: Path, shapes: dict[str, int], device: torch.device) -> None:
    """Writes a random Qwen2 in bfloat16, and a tokenizer of a word for each number."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    config = Qwen2Config(tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, **shapes)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, like in lm.named_parameters():
        value = torch.randn(like.shape, generator=generator, device=device) * INITIAL_STD
        if name == "model.norm.weight":  # logits: tied embeddings times a vector of this length
            value = value.fill_(LOGITS_STD / (INITIAL_STD * shapes["hidden_size"] ** 0.5))
        elif name.endswith("norm.weight"):
            value = value.fill_(1.0)
        weights[name] = value.to(torch.bfloat16).cpu()
    config.dtype = "bfloat16"
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    names = ["<eos>", "<unk>", *(f"t{i}" for i in range(2, shapes["vocab_size"] - UNUSED))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def make_step(run: Run, responses: int | None = None, seed: int = 0) -> OptimizerStep:
    """Random responses, all with the same weight for each token, in random order. Their lengths are
    the quantiles of a log-normal distribution; its longest ones are cut, which leaves a coefficient
    of variation of 1."""
    sizes, rng = run.sizes, np.random.default_rng(seed)
    count = responses or sizes.responses
    z = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    drawn = rng.permutation(np.exp(np.log(sizes.mean) - SIGMA**2 / 2 + SIGMA * z))
    known = min(m["vocab_size"] for m in (sizes.model, sizes.short, sizes.checked)) - UNUSED
    samples = []
    for i, length in enumerate(np.clip(drawn, 2, sizes.longest).astype(int)):
        ids = rng.integers(2, known, sizes.prompt + length)
        prompt = Prompt(i, ids[: sizes.prompt], "none", {})
        samples.append(Sample(prompt, i, ids[sizes.prompt :], "length", advantage=rng.normal()))
    total = sum(s.length for s in samples)
    return OptimizerStep(samples, np.full(count, 1 / total, np.float32))


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, function: Callable[[], Any]) -> float:
    """Of one call, with all that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(
    device: torch.device, function: Callable[[], Any], repeats: int, calls: int = 1
) -> float:
    """Of one call: the median of `repeats` measurements of `calls` calls; after one that doesn't
    count."""

    def many() -> None:
        for _ in range(calls):
            function()

    function()
    return statistics.median(seconds(device, many) for _ in range(repeats)) / calls


def peak_bytes(device: torch.device, function: Callable[[], Any]) -> int:
    """The most that is allocated during a call, above what was before; on a CPU by the profiler."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: Any = profiler.profiler
    sizes = [
        (e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"
    ]
    return int(np.cumsum([size for _, size in sorted(sizes)]).max(initial=0))


def memory_plan(run: Run, tokens: int, checkpointing: bool, offload: bool) -> Plan:
    """The project's estimate for an update of the large model on this one device."""
    model = json.loads((run.model("model") / "config.json").read_text())
    return plan_of(run, model, tokens, checkpointing, offload)


def plan_of(
    run: Run, model: dict[str, Any], tokens: int, checkpointing: bool, offload: bool
) -> Plan:
    """The same of any model: the content of its config.json."""
    actor = "actor_rollout_ref.actor"
    keys = {
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": tokens,
        f"{actor}.fsdp_config.param_offload": offload,
        f"{actor}.fsdp_config.optimizer_offload": offload,
        "actor_rollout_ref.model.enable_gradient_checkpointing": checkpointing,
        "data.max_prompt_length": run.sizes.prompt,
        "data.max_response_length": run.sizes.longest,
        "trainer.n_gpus_per_node": 1,
    }
    config: Any = Config()  # references to other keys stay unresolved; those used are given
    for key, value in keys.items():
        config = changed(config, key, value)
    return Plan(config, model, run.device.type, device_memory(run.device))


def fitting_layers(run: Run) -> int:
    """Of the large model: halved until an update with gradient checkpointing fits."""
    config, budget = run.sizes.model, run.sizes.budgets[-1]
    layers = config["num_hidden_layers"]
    while layers > 1:
        model = config | {"model_type": "qwen2", "num_hidden_layers": layers}
        plan = plan_of(run, model | {"tie_word_embeddings": True}, budget, True, False)
        if fits(plan):
            break
        layers //= 2
    return layers


def fits(plan: Plan) -> bool:
    """Whether an update does, on a device without an engine."""
    return sum(plan.training().values()) <= plan.memory


@cache
def device_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _host_memory()["total"]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """‖value − expected‖ / ‖expected‖; NaN if there is one in either."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size > 2**27 else f"{size / 2**20:.2f} MiB"


class Wrong(AssertionError):
    """A section's figure that is out of its bounds."""


def require(condition: bool, text: str) -> None:
    """Raises: Wrong, unless `condition` holds (NaN compares as False)."""
    if not condition:
        raise Wrong(text)
