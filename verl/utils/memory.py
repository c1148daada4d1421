"""How much memory a run will take, from its configuration and the model's config.json alone.

Exact for parameters, gradients and optimizer states (FSDP2 pads each tensor's rows to a multiple of
the ranks). Activations are counted tensor by tensor, as the Hugging Face layers keep them. What
CUDA, NCCL and a sleeping vLLM take for themselves is assumed: `CONTEXT` and `ASLEEP`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from verl.trainer.config.schema import Config

GIB = 2**30
KINDS = ("llama", "mistral", "qwen2", "qwen3")
CONTEXT, ASLEEP = 2 * GIB, 1 * GIB
LOGITS = 2**22, 2**25
"""Numbers of a tile (`verl.utils.device.default_tile`) on a CPU, on a GPU."""
BUCKET = 2**28
"""`verl.workers.weight_sync.BUCKET_BYTES`."""
REORDERED_FROM = 2**17
"""That of `verl.utils.device`, which imports torch."""

SETTINGS = {
    "nodes": "trainer.nnodes",
    "ranks": "trainer.n_gpus_per_node",
    "engine_gpus": "trainer.rollout_gpus_per_node",
    "prompt": "data.max_prompt_length",
    "response": "data.max_response_length",
    "checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
    "packed": "actor_rollout_ref.model.use_remove_padding",
    "dynamic": "actor_rollout_ref.actor.use_dynamic_bsz",
    "micro_size": "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "micro_tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "precision": "actor_rollout_ref.actor.fsdp_config.mixed_precision",
    "optimizer_offload": "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "param_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
    "ref_offload": "actor_rollout_ref.ref.fsdp_config.param_offload",
    "kl_loss": "actor_rollout_ref.actor.use_kl_loss",
    "kl_reward": "algorithm.use_kl_in_reward",
    "engine": "actor_rollout_ref.rollout.name",
    "utilization": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "parallel": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "sleeps": "actor_rollout_ref.rollout.free_cache_engine",
    "max_num_seqs": "actor_rollout_ref.rollout.max_num_seqs",
    "batched_tokens": "actor_rollout_ref.rollout.max_num_batched_tokens",
}
"""Attribute of `Plan` → the key that it comes from."""

Parts = dict[str, float]
Shapes = list[tuple[int, int]]


def weight_shapes(model: dict[str, Any]) -> tuple[Shapes, Shapes]:
    """(rows, columns) of each parameter outside of the decoder layers, and of one layer, whose
    first is that of the queries. A vector has one column.

    Args:
        model: the content of config.json.

    Raises: ValueError for a model whose layers are not known here.
    """
    kind = model.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"none for {kind} models, only for {', '.join(KINDS)}")
    heads, H, V = model["num_attention_heads"], model["hidden_size"], model["vocab_size"]
    size = model.get("head_dim") or H // heads
    A, inner = heads * size, model["intermediate_size"]
    K = (model.get("num_key_value_heads") or heads) * size
    biased, norms = model.get("attention_bias", kind == "qwen2"), kind == "qwen3"
    root = [(V, H), (H, 1)] + [(V, H)] * (not model.get("tie_word_embeddings", False))
    layer = [(A, H), (K, H), (K, H), (H, A), (inner, H), (inner, H), (H, inner)]
    layer += [(H, 1)] * 2 + [(A, 1), (K, 1), (K, 1)] * biased + [(size, 1)] * 2 * norms
    return root, layer


class Plan:
    """One run on devices of `memory` bytes each; for the CPU, machines of `memory` bytes."""

    def __init__(
        self,
        config: Config,
        model: dict[str, Any],
        device: str,
        memory: float,
        host_memory: float = math.inf,
        **changed: Any,
    ) -> None:
        """`model`: the content of config.json; `host_memory`: bytes of a machine, where `memory` is
        a GPU's; `changed`: settings other than those of `config`.

        Raises: ValueError for a model whose layers are not known here.
        """
        self.arguments, self.changed = (config, model, device, memory, host_memory), changed
        for name, key in SETTINGS.items():
            setattr(self, name, changed.get(name, attrgetter(key)(config)))
        self.root, self.layer = weight_shapes(model)
        self.cuda, self.memory, self.host_memory = device == "cuda", memory, host_memory
        self.parallel = self.parallel if self.engine == "vllm" else 1
        self.reference = self.kl_loss or self.kl_reward
        self.engines = (self.engine_gpus or self.ranks) // self.parallel
        self.longest = self.prompt + self.response
        self.tokens = self.micro_tokens if self.dynamic else self.micro_size * self.longest
        half = self.precision.param_dtype == "bfloat16" or not self.precision.param_dtype
        self.compute = 2 if half and self.cuda else 4  # bytes of a number
        self.reduce = 4 if self.precision.reduce_dtype == "float32" else 2

        self.heads, self.layers = model["num_attention_heads"], model["num_hidden_layers"]
        self.hidden, self.vocab = model["hidden_size"], model["vocab_size"]
        (self.wide, _), (self.narrow, _), _, _, (self.inner, _), *_ = self.layer
        size = self.wide // self.heads  # of a head
        kv_heads = self.narrow // size
        self.norms = model["model_type"] == "qwen3"  # of queries and keys
        self.kv_token = 2 * self.layers * max(1, kv_heads // self.parallel) * size * self.compute
        self.parameters = self._count(1)
        self.shard = self._count(self.nodes * self.ranks)
        """Parameters of a rank, padding included."""

    def _count(self, ranks: int) -> int:
        root, layer = (sum(-(-r // ranks) * c for r, c in x) for x in (self.root, self.layer))
        return root + self.layers * layer

    def activations(self) -> float:
        """Bytes that an update takes beside weights and optimizer, with gradients in flight."""
        c, H, T = self.compute, self.hidden, self.tokens
        root, layer = (sum(r * columns for r, columns in x) for x in (self.root, self.layer))
        # A norm keeps its input and result in fp32 or as they are. SDPA's keys and values are
        # repeated for each head, and its outputs copied; the packed kernel does neither.
        norms = (4 + 2 * c) * (2 * H + (self.wide + self.narrow) * self.norms)
        kernel = self.cuda and self.packed and c == 2
        attention = c * (2 * self.wide + 2 * self.narrow if kernel else 5 * self.wide)
        one = T * (norms + attention + 4 * c * self.inner)
        kept = T * c * H * self.layers if self.checkpointing else one * self.layers
        kept += T * (4 + 4 * c) * H  # final norm, and the hidden states that predict
        # The backward pass is fullest in the head, in the first layer after it, or at its end.
        head = self.vocab * H
        in_head = min(LOGITS[self.cuda], T * self.vocab) * (8 + c % 4) + (4 + c) * head
        in_layer = 3 * c * T * self.inner + c * head + (c + self.reduce) * layer
        in_layer += one * self.checkpointing
        return max(kept + max(in_head, in_layer), (c + self.reduce) * root)

    def resting(self) -> Parts:
        """Bytes that a rank keeps on its device while an engine works there."""
        return {
            "parameters": 4 * self.shard * (not self.param_offload),
            "optimizer": 8 * self.shard * (not self.optimizer_offload),
            "reference": 4 * self.shard * (self.reference and not self.ref_offload),
            "process": CONTEXT,
        }

    def updating(self) -> Parts:
        """Bytes that a rank keeps on its device all through an update."""
        parts = self.resting() | {"parameters": 4 * self.shard, "optimizer": 8 * self.shard}
        return parts | {"gradients": 4 * self.shard}

    def training(self) -> Parts:
        """Peak bytes of a rank in the passes of an update."""
        root, layer = (sum(r * c for r, c in x) for x in (self.root, self.layer))
        gathered = self.compute * (root + 2 * layer)
        return self.updating() | {"gathered": gathered, "activations": self.activations()}

    def stepping(self) -> Parts:
        """Peak bytes of a rank in an optimizer step. On a GPU, torch's AdamW goes through all
        tensors together (`foreach`), and takes the root of all second moments at a time."""
        return self.updating() | {"AdamW's work": 4 * self.shard * self.cuda}

    def generating(self) -> Parts:
        """Bytes of an engine on each of its devices. vLLM's cache gets what its share leaves."""
        weights = self.compute * self.parameters / self.parallel
        if self.engine == "hf" and not self.cuda:  # copies of verl.models.onednn, the head's first
            layers = [rows * columns for rows, columns in self.layer if columns > 1] * self.layers
            large = [n for n in (self.vocab * self.hidden, *layers) if n >= REORDERED_FROM]
            weights += self.compute * sum(large)
        rows = self.max_num_seqs if self.engine == "hf" else self.batched_tokens
        work = 8.0 * self.max_num_seqs * self.vocab
        work += rows * self.compute * (2 * self.hidden + 3 * self.inner / self.parallel)
        cache = float(self.kv_token * self.longest * self.max_num_seqs)
        if self.engine == "vllm":
            share = self.utilization * self.memory - weights - work
            cache = share if self.cuda else min(cache, self.memory / 20)
        return {"engine's weights": weights, "engine's work": work, "KV cache": cache}

    def phases(self) -> dict[str, Parts]:
        """Bytes on a device in each phase of a step; for the CPU, on a machine altogether."""
        generating, training, step = self.generating(), self.training(), self.stepping()
        asleep = {"engine's process": float(ASLEEP)}
        if not self.cuda:  # nothing sleeps
            ranks = {f"ranks' {k}": v * self.ranks for k, v in training.items()}
            return {"machine": ranks | {k: v * self.engines for k, v in generating.items()}}
        widest = max(BUCKET, 4 * self.vocab * self.hidden)  # a large tensor stands alone
        weights = {"engine's weights": generating["engine's weights"]}
        sync = self.resting() | {"parameters": 4 * self.shard, "bucket": 1.5 * widest}
        if self.engine_gpus:
            engine = {"generate, engine": generating | asleep}
            return engine | {"train": training, "optimizer step": step, "new weights": sync}
        if self.engine == "vllm" and not self.sleeps:
            asleep |= generating
        phases = {"generate": self.resting() | generating | asleep, "train": training | asleep}
        phases |= {"optimizer step": step | asleep}
        return phases | {"new weights": sync | asleep | weights}

    def host(self) -> Parts:
        """Bytes of the first node's memory, for devices other than the CPU, when it is fullest: at
        the start, or from the first optimizer step on."""
        shards, engines = self.shard * self.ranks, self.engines * (self.engine == "hf")
        start = {
            "rank 0 loads the model": 4 * self.parameters,
            "engines load it": self.compute * self.parameters * engines,
        }
        trained = {"offloaded optimizer": 8 * shards * self.optimizer_offload}
        return {
            "offloaded parameters": 4 * shards * self.param_offload,
            "offloaded reference": 4 * shards * (self.reference and self.ref_offload),
            "processes": 2 * GIB * (self.ranks + self.engines),
        } | max(start, trained, key=lambda parts: sum(parts.values()))

    def fits(self) -> bool:
        """Whether each phase does, with a cache for one sequence at least, and the host's part."""
        enough = self.generating()["KV cache"] >= self.kv_token * self.longest
        enough &= not self.cuda or sum(self.host().values()) <= self.host_memory
        return enough and all(sum(p.values()) <= self.memory for p in self.phases().values())

    def remedies(self) -> Iterator[Plan]:
        """Other settings that fit: those with the fewest changes first, then more machines."""
        gpus = self.engine_gpus or self.ranks
        tries: list[tuple[str, Any]] = [("optimizer_offload", True), ("param_offload", True)]
        tries += [("ref_offload", True)] * self.reference
        tries += [("checkpointing", True), ("sleeps", True)]
        sizes = [("micro_size", size) for size in (2, 1) if size < (self.micro_size or 0)]
        tries += [("micro_tokens", self.longest)] if self.dynamic else sizes
        if self.engine == "vllm":
            tries += [("utilization", share) for share in (0.8, 0.7, 0.6, 0.5, 0.4)]
            tries += [("parallel", p) for p in (2, 4, 8) if gpus % p == self.heads % p == 0]
        tries = [(k, v) for k, v in tries if getattr(self, k) not in (v, None)]
        for more, count in itertools.product((1, 2, 4), range(5)):
            machines = {"nodes": more * self.nodes} if more > 1 else {}
            for chosen in itertools.combinations(tries, count):
                plan = Plan(*self.arguments, **(machines | dict(chosen)))
                if len(plan.changed) == len(machines) + count and plan.fits():
                    yield plan

    def __str__(self) -> str:
        """A table with a verdict."""
        groups = self.phases() | ({"host, machine": self.host()} if self.cuda else {})
        lines = [f"  {'GiB':16}  total"]
        for name, parts in groups.items():
            text = ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts.items() if round(v / GIB, 1))
            lines.append(f"  {name:16}{sum(parts.values()) / GIB:7.1f}  {text}")
        cached = self.generating()["KV cache"] / (self.kv_token * self.longest)
        lines.append(
            f"  {self.nodes * self.ranks} rank(s), micro-batches of {self.tokens} tokens; a KV "
            f"cache holds {max(0, cached):.0f} responses of full length"
        )
        return "\n".join([*lines, f"  {self.verdict()}"])

    def verdict(self) -> str:
        """Whether it fits; if not, the smallest change with which it would."""
        if self.fits():
            return "it fits"
        plan = next(self.remedies(), None)
        if plan is None:
            return "it does not fit: take more devices, or a smaller model"
        keys = " ".join(f"{SETTINGS[name]}={value}" for name, value in plan.changed.items())
        return f"it does not fit; it would with {keys}"


def read_model(path: str) -> dict[str, Any] | None:
    """config.json of a folder or of a model in the hub's local cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file: Any = Path(path).expanduser() / "config.json"
    if not file.is_file():
        try:
            file = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # no name of the hub
            return None
    return json.loads(Path(file).read_text()) if isinstance(file, str | Path) else None


def gpu_memory() -> float | None:
    """Bytes of this machine's first GPU, if there is one."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=2).stdout
        return float(found.split()[0]) * 2**20
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def estimate(config: Config) -> str:
    """What DRY_RUN=1 says about memory; takes neither torch nor the network."""
    model = read_model(path := config.actor_rollout_ref.model.path)
    if model is None:
        line = f"memory estimate: it needs config.json of {path}, which is not on this machine"
        hub = path.count("/") == 1 and path[0] not in "/.~"
        return line + f": hf download {path} config.json" * hub
    model |= config.actor_rollout_ref.model.override_config
    device = config.trainer.device or "cuda"
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device == "cpu":
        memory, origin = host, "this machine's"
    elif found := gpu_memory():
        memory, origin = found, f"this machine's GPU; its host has {host / GIB:.0f}"
    else:  # nor is the host known that will have one
        memory, host = 79.0 * GIB, math.inf
        origin = "no GPU is visible: 80 GB are assumed"
    try:
        plan = Plan(config, model, device, memory, host)
    except ValueError as error:
        return f"memory estimate: {error}"
    size = f"{plan.parameters / 1e9:.3g} billion parameters, {memory / GIB:.0f} GiB ({origin})"
    return f"memory estimate: {size}\n{plan}"
