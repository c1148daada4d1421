"""How much memory a run will take, from its configuration and the model's config.json alone:
`python -m verl.tools.memory_plan FILE`. The file is config.yaml of a run, or what DRY_RUN=1 prints;
without one, that comes on standard input.

Exact for parameters, gradients and optimizer states (FSDP2 pads each tensor's rows to a multiple of
the ranks). Activations are counted tensor by tensor, as the Hugging Face layers keep them. What
CUDA, NCCL, a sleeping vLLM and its CUDA graphs take for themselves is assumed: `CONTEXT`, `ASLEEP`
and `GRAPHS`. GPU_GB=N in the environment: for a GPU of N GB instead of this machine's.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from verl.config.schema import Config
from verl.tools.machine import read_gpus
from verl.tools.model_shapes import Shapes, adapter_shapes, numbers, read_model, weight_shapes

GIB = 2**30
CONTEXT, ASLEEP, GRAPHS = 2 * GIB, 1 * GIB, 1.5 * GIB
LOGITS = {"cpu": 2**22, "cuda": 2**25}
"""Numbers of a tile (`verl.utils.device.default_tile`)."""
CHUNK = 2**28
"""`verl.weight_sync.CHUNK_BYTES`."""
REORDERED_FROM = 2**17
"""That of `verl.utils.device`, which imports torch."""

Parts = dict[str, float]


def changed(section: Any, key: str, value: Any) -> Any:
    """A copy of a section whose dotted `key` has another value."""
    name, _, rest = key.partition(".")
    if rest:
        value = changed(getattr(section, name), rest, value)
    return replace(section, **{name: value})


def without_lora(config: Config) -> Config:
    """The same run, that trains all weights."""
    model = replace(config.actor_rollout_ref.model, lora_rank=0, lora_adapter_path=None)
    found: Config = changed(config, "actor_rollout_ref.model", model)
    return found


class Plan:
    """One run on devices of `memory` bytes each; for the CPU, machines of `memory` bytes."""

    def __init__(
        self,
        config: Config,
        model: dict[str, Any],
        device: str,
        memory: float,
        host_memory: float = math.inf,
        beside: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> None:
        """`model`: the content of config.json; `host_memory`: bytes of a machine, where `memory` is
        a GPU's; `beside`: config.json of the `reward model` and of the `critic`, if there are any.

        Raises: ValueError for a model whose layers are not known here.
        """
        self.config, self.model, self.device = config, model, device
        self.memory, self.host_memory, self.cuda = memory, host_memory, device == "cuda"
        self.data, self.trainer, models = config.data, config.trainer, config.actor_rollout_ref
        self.actor, self.rollout, self.fsdp = models.actor, models.rollout, models.actor.fsdp_config
        self.packed = models.model.use_remove_padding
        self.checkpointing = models.model.enable_gradient_checkpointing
        offloads = self.cuda and models.model.enable_activation_offload
        self.offloads_inputs = offloads and self.checkpointing
        self.vllm, self.max_num_seqs = self.rollout.name == "vllm", self.rollout.max_num_seqs
        self.ranks = self.trainer.n_gpus_per_node
        self.engine_gpus = self.trainer.rollout_gpus_per_node
        self.parallel = self.rollout.tensor_model_parallel_size if self.vllm else 1
        self.engines = (self.engine_gpus or self.ranks) // self.parallel
        self.lora = models.model.uses_lora
        kl_terms = self.actor.use_kl_loss or config.algorithm.use_kl_in_reward
        self.reference = kl_terms and not self.lora  # else it is the frozen model
        self.offloads_reference = models.ref.fsdp_config.param_offload
        self.longest = self.data.max_prompt_length + self.data.max_response_length
        size = self.actor.ppo_micro_batch_size_per_gpu
        self.by_budget = self.actor.use_dynamic_bsz or size is None
        self.tokens = self.actor.ppo_max_token_len_per_gpu
        self.split = self.actor.ulysses_sequence_parallel_size  # ranks that share a micro-batch
        if size is not None and not self.by_budget:
            self.tokens = -(-size * self.longest // self.split)
        precision = self.fsdp.mixed_precision
        half = self.cuda and precision.param_dtype in (None, "bfloat16")
        self.compute = 2 if half else 4  # bytes of a number
        self.reduce = 4 if precision.reduce_dtype == "float32" else 2
        self._read_shapes()
        self.has_head = True
        self.beside = {
            name: Plan(as_policy(config, name), other | HEADLESS, device, memory)
            for name, other in beside.items()
        }
        self.scorer, self.critic = (self.beside.get(n) for n in ("reward model", "critic"))
        for other in self.beside.values():
            other.has_head = False

    def _read_shapes(self) -> None:
        """What the model is made of, and how much of it a rank has."""
        self.root, self.layer = weight_shapes(self.model)
        self.heads, self.layers = (
            self.model[f"num_{x}"] for x in ("attention_heads", "hidden_layers")
        )
        self.hidden, self.vocab = self.model["hidden_size"], self.model["vocab_size"]
        (self.wide, _), (self.narrow, _), _, _, (self.inner, _), *_ = self.layer
        head = self.wide // self.heads
        kv_heads = max(1, self.narrow // head // self.parallel)  # of an engine's device
        self.repeated = self.split // math.gcd(self.split, self.narrow // head)
        self.norms = self.model["model_type"] == "qwen3"  # of queries and keys
        self.kv_token = 2 * self.layers * kv_heads * head * self.compute
        self.parameters = self._count(1)
        size = self.fsdp.fsdp_size
        self.sharers = size if size > 0 else self.trainer.nnodes * self.ranks
        self.shard = self._count(self.sharers)
        """The model's parameters of a rank, padding included."""
        models = self.config.actor_rollout_ref
        dtypes = self.fsdp.model_dtype, models.ref.fsdp_config.model_dtype
        self.master, of_reference = (4.0 if dtype == "float32" else 2.0 for dtype in dtypes)
        self.weights, self.reference_weights = self.master * self.shard, of_reference * self.shard
        """Bytes of the actor's and of the reference's parameters on a rank."""
        self.trainable, self.trained = self.parameters, self.weights
        """How many parameters are trained, and their bytes on a rank."""
        if self.lora:
            adapters = adapter_shapes(models.model, self.layer, self.layers)
            self.trainable = numbers(adapters)
            held = padded(adapters, self.sharers)  # fp32 whatever the model is
            self.trained = 4.0 * numbers(held)
            self.weights += self.trained

    def _count(self, ranks: int) -> int:
        layer = self.layers * numbers(padded(self.layer, ranks))
        return numbers(padded(self.root, ranks)) + layer

    def activations(self) -> float:
        """Bytes that an update takes beside weights and optimizer, with gradients in flight."""
        c, H, T = self.compute, self.hidden, self.tokens
        root, layer = numbers(self.root), numbers(self.layer)
        adapter = self.lora * self.trainable // self.layers
        # A norm keeps its input and result in fp32 or as they are. SDPA's keys and values are
        # repeated for each head, and its outputs copied; the packed kernel does neither. Ranks that
        # split sequences exchange the outputs, and have a head of keys each, at least.
        normed = 2 * H + (self.wide + self.narrow if self.norms else 0)
        kernel = self.cuda and self.packed and c == 2
        attention = 2 * self.wide + 2 * self.narrow * self.repeated if kernel else 5 * self.wide
        attention = c * (attention + (self.wide if self.split > 1 else 0))
        one = T * ((4 + 2 * c) * normed + attention + 4 * c * self.inner)
        kept = self.inputs() if self.checkpointing else one * self.layers
        kept = 0 if self.offloads_inputs else kept
        kept += T * (4 + 4 * c) * H  # final norm, and the hidden states that predict
        # The backward pass is fullest in the head, in the first layer after it, or at its end.
        # Frozen weights have no gradients.
        head = self.vocab * H * self.has_head
        if self.lora:
            head, root, layer = 0, 0, adapter
        of_logit = 10 if c == 2 else 8
        logits = min(LOGITS[self.device], T * self.vocab) * self.has_head
        in_head = logits * of_logit + (4 + c) * head
        in_layer = 3 * c * T * self.inner + c * head + (c + self.reduce) * layer
        in_layer += one if self.checkpointing else 0
        return max(kept + max(in_head, in_layer), (c + self.reduce) * root)

    def inputs(self) -> float:
        """Bytes of the decoder layers' inputs in a pass."""
        return self.tokens * self.compute * self.hidden * self.layers

    def resting(self) -> Parts:
        """Bytes that a rank keeps on its device while an engine works there."""
        resident = self.reference and not self.offloads_reference
        parts = {
            "parameters": 0 if self.fsdp.param_offload else self.weights,
            "optimizer": 0 if self.fsdp.optimizer_offload else 2 * self.trained,
            "reference": self.reference_weights if resident else 0,
        }
        for name, plan in self.beside.items():
            parts[name] = 0 if plan.fsdp.param_offload else plan.weights
        if self.critic and not self.critic.fsdp.optimizer_offload:
            parts["critic's optimizer"] = 2 * self.critic.trained
        return parts | {"process": CONTEXT}

    def updating(self) -> Parts:
        """Bytes that a rank keeps on its device all through an update."""
        parts = self.resting() | {"parameters": self.weights, "optimizer": 2 * self.trained}
        return parts | {"gradients": self.trained}

    def scoring(self, model: "Plan") -> Parts:
        """Peak bytes of a rank in a forward pass of the reward model."""
        reward, c = self.config.reward_model, model.compute
        size = None if reward.use_dynamic_bsz else reward.micro_batch_size_per_gpu
        longest = reward.max_length or self.longest
        tokens = size * longest if size else max(reward.forward_max_token_len_per_gpu, longest)
        parts = self.resting() | {"reward model": model.weights}
        parts["gathered"] = c * (numbers(model.root) + 2 * numbers(model.layer))
        width = (4 + 4 * c) * model.hidden + c * (5 * model.wide + 3 * model.inner)
        return parts | {"activations": tokens * width}

    def training(self) -> Parts:
        """Peak bytes of a rank in the passes of an update."""
        gathered = self.compute * (numbers(self.root) + 2 * numbers(self.layer))
        return self.updating() | {"gathered": gathered, "activations": self.activations()}

    def training_critic(self, critic: "Plan") -> Parts:
        """Peak bytes of a rank while the critic is updated."""
        own = critic.training()
        names = {"parameters": "critic", "optimizer": "critic's optimizer"}
        names |= {k: f"critic's {k}" for k in ("gradients", "gathered", "activations")}
        return self.resting() | {name: own[part] for part, name in names.items()}

    def resuming(self) -> Parts:
        """Peak bytes of a rank that loads a checkpoint: its states are made, with gradients, and
        the largest tensor came whole when the model was built."""
        return self.updating() | {"largest tensor": self.master * self.vocab * self.hidden}

    def generating(self) -> Parts:
        """Bytes of an engine on each of its devices. vLLM's cache gets what its share leaves."""
        weights = self.compute * self.parameters / self.parallel
        if not (self.vllm or self.cuda):  # copies of join_linears, the head's first
            q, k, v, o, gate, up, *down = (r * columns for r, columns in self.layer if columns > 1)
            layers = [q + k + v, o, gate + up, *down] * self.layers
            large = [n for n in (self.vocab * self.hidden, *layers) if n >= REORDERED_FROM]
            weights += self.compute * sum(large)
        rows = self.rollout.max_num_batched_tokens if self.vllm else self.max_num_seqs
        work = 8.0 * self.max_num_seqs * self.vocab
        work += rows * self.compute * (2 * self.hidden + 3 * self.inner / self.parallel)
        cache = float(self.kv_token * self.longest * self.max_num_seqs)
        if self.vllm:
            share = self.rollout.gpu_memory_utilization * self.memory - weights - work
            cache = share if self.cuda else min(cache, self.memory / 20)
        return {"engine's weights": weights, "engine's work": work, "KV cache": cache}

    def phases(self) -> dict[str, Parts]:
        """Bytes on a device in each phase of a step; for the CPU, on a machine altogether."""
        generating, training, resuming = self.generating(), self.training(), self.resuming()
        graphs = GRAPHS if self.vllm and not self.rollout.enforce_eager else 0
        asleep = {"engine's process": float(ASLEEP), "CUDA graphs": graphs}
        if not self.cuda:  # nothing sleeps
            if self.critic:
                own = self.training_critic(self.critic)
                training = max(training, own, key=lambda parts: sum(parts.values()))
            ranks = {f"ranks' {k}": v * self.ranks for k, v in training.items()}
            return {"machine": ranks | {k: v * self.engines for k, v in generating.items()}}
        widest = max(CHUNK, self.master * self.vocab * self.hidden)  # a large tensor stands alone
        weights = {"engine's weights": generating["engine's weights"]}
        sync = self.resting() | {"parameters": self.weights, "chunk": 1.5 * widest}
        score = {"score": self.scoring(self.scorer)} if self.scorer else {}
        if self.critic:
            score["train critic"] = self.training_critic(self.critic)
        if self.engine_gpus:
            engine = {"generate, engine": generating | asleep}
            return engine | score | {"resume": resuming, "train": training, "new weights": sync}
        if self.vllm and not self.rollout.free_cache_engine:
            asleep |= generating
        phases = {name: parts | asleep for name, parts in score.items()}
        phases |= {"resume": resuming | asleep, "train": training | asleep}
        phases |= {"generate": self.resting() | generating | asleep}
        return phases | {"new weights": sync | asleep | weights}

    def host(self) -> Parts:
        """Bytes of the first node's memory, for devices other than the CPU, when it is fullest: at
        the start, or from the first optimizer step on."""
        largest = max(p.master * p.parameters for p in (self, *self.beside.values()))
        loading = {"rank 0 loads the model": largest}
        if not self.vllm:
            loading["engines load it"] = self.compute * self.parameters * self.engines
        offloading = [p for p in (self, self.critic) if p and p.fsdp.optimizer_offload]
        states = sum(2 * p.trained * self.ranks for p in offloading)
        trained = {"offloaded optimizer": states} if offloading else {}
        parts = {"processes": 2.0 * GIB * (self.ranks + self.engines)}
        if self.fsdp.param_offload:
            parts["offloaded parameters"] = self.weights * self.ranks
        if self.offloads_inputs:
            parts["offloaded activations"] = self.inputs() * self.ranks
        if self.reference and self.offloads_reference:
            parts["offloaded reference"] = self.reference_weights * self.ranks
        for name, plan in self.beside.items():
            if plan.fsdp.param_offload:
                parts[f"offloaded {name}"] = plan.weights * self.ranks
        return parts | max(loading, trained, key=lambda phase: sum(phase.values()))

    def fits(self) -> bool:
        """Whether each phase does, with a cache for one sequence at least, and the host's part."""
        if self.generating()["KV cache"] < self.kv_token * self.longest:
            return False
        if self.by_budget and self.split * self.tokens < self.longest:
            return False
        if self.cuda and sum(self.host().values()) > self.host_memory:
            return False
        return all(sum(parts.values()) <= self.memory for parts in self.phases().values())

    def remedies(self) -> Iterator[dict[str, Any]]:
        """Other settings that fit: those with the fewest changes first, then more machines."""
        changes = [item for item in self._changes() if attrgetter(item[0])(self.config) != item[1]]
        for factor, count in itertools.product((1, 2, 4), range(5)):
            for chosen in itertools.combinations(changes, count):
                keys = dict(chosen)
                if len(keys) < count:  # two values of a key
                    continue
                if factor > 1:
                    keys = {"trainer.nnodes": factor * self.trainer.nnodes} | keys
                config = reduce(lambda c, item: changed(c, *item), keys.items(), self.config)
                beside = {name: plan.model for name, plan in self.beside.items()}
                place = self.device, self.memory, self.host_memory
                if Plan(config, self.model, *place, beside).fits():
                    yield keys

    def _changes(self) -> list[tuple[str, Any]]:
        """Keys and values that take less memory, the cheapest first."""

        def sizes(devices: int) -> list[int]:
            return [size for size in (2, 4, 8) if devices % size == self.heads % size == 0]

        on = ["actor.fsdp_config.optimizer_offload", "actor.fsdp_config.param_offload"]
        on += ["ref.fsdp_config.param_offload"] * self.reference
        on += ["reward_model.model.fsdp_config.param_offload"] * (self.scorer is not None)
        offloads = ("optimizer_offload", "param_offload") if self.critic else ()
        on += [f"critic.model.fsdp_config.{name}" for name in offloads]
        on += ["model.enable_gradient_checkpointing", "rollout.free_cache_engine"]
        changes: list[tuple[str, Any]] = [(key, True) for key in on]
        splits = [s for s in sizes(self.trainer.nnodes * self.ranks) if s > self.split]
        splits = splits if self.packed else []
        if self.by_budget:
            budgets = [-(-self.longest // split) for split in (self.split, *splits)]
            changes += [("actor.ppo_max_token_len_per_gpu", tokens) for tokens in budgets]
            if self.critic and self.critic.by_budget:
                changes.append(("critic.ppo_max_token_len_per_gpu", self.longest))
        else:
            fewer = [n for n in (2, 1) if n * self.longest < self.split * self.tokens]
            changes += [("actor.ppo_micro_batch_size_per_gpu", n) for n in fewer]
        changes += [("actor.ulysses_sequence_parallel_size", split) for split in splits]
        if self.vllm:
            gpus, shares = self.engine_gpus or self.ranks, (0.8, 0.7, 0.6, 0.5, 0.4)
            changes += [("rollout.gpu_memory_utilization", share) for share in shares]
            changes += [("rollout.tensor_model_parallel_size", size) for size in sizes(gpus)]
        others = "reward_model.", "critic."
        return [(k if k.startswith(others) else f"actor_rollout_ref.{k}", v) for k, v in changes]

    def __str__(self) -> str:
        """A table with a verdict."""
        groups = self.phases()
        if self.cuda:
            groups["host, machine"] = self.host()
        lines = [f"  {'GiB':16}  total"]
        for name, parts in groups.items():
            text = ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts.items() if round(v / GIB, 1))
            lines.append(f"  {name:16}{sum(parts.values()) / GIB:7.1f}  {text}")
        cached = self.generating()["KV cache"] / (self.kv_token * self.longest)
        lines.append(
            f"  {self.trainer.nnodes * self.ranks} rank(s), each with {self.tokens} tokens of a "
            f"micro-batch; a KV cache holds {max(0, cached):.0f} responses of full length"
        )
        return "\n".join([*lines, f"  {self.verdict()}"])

    def verdict(self) -> str:
        """Whether it fits; if not, the smallest change with which it would."""
        need = {name: sum(parts.values()) for name, parts in self.phases().items()}
        largest = max(need, key=lambda name: need[name])
        if self.fits():
            return f"it fits; most is needed in {largest!r}: {need[largest] / GIB:.1f} GiB"
        keys = next(self.remedies(), None)
        if keys is None:
            return f"it does not fit ({largest}): take more devices, or a smaller model"
        changes = " ".join(f"{k}={v}" for k, v in keys.items())
        return f"it does not fit ({largest}); it would with {changes}"


HEADLESS = {"tie_word_embeddings": True}
"""In config.json of a model whose head is one row."""


def as_policy(config: Config, name: str) -> Config:
    """The run with the settings of its `reward model` or `critic` as those of the policy."""
    models, own = without_lora(config).actor_rollout_ref, config.reward_model.model
    actor = replace(models.actor, fsdp_config=own.fsdp_config)
    model = models.model
    if name == "critic":
        critic = config.critic
        actor = replace(
            models.actor,
            fsdp_config=critic.model.fsdp_config,
            ppo_micro_batch_size_per_gpu=critic.ppo_micro_batch_size_per_gpu,
            use_dynamic_bsz=critic.use_dynamic_bsz,
            ppo_max_token_len_per_gpu=critic.ppo_max_token_len_per_gpu,
            ulysses_sequence_parallel_size=critic.ulysses_sequence_parallel_size,
        )
        packed, again = (
            critic.model.use_remove_padding,
            critic.model.enable_gradient_checkpointing,
        )
        model = replace(
            model,
            use_remove_padding=packed,
            enable_gradient_checkpointing=again,
            enable_activation_offload=False,
        )
    return replace(config, actor_rollout_ref=replace(models, actor=actor, model=model))


def padded(shapes: Shapes, ranks: int) -> Shapes:
    """What one of so many ranks holds of tensors of these (rows, columns)."""
    return [(-(-rows // ranks), columns) for rows, columns in shapes]


def usable(gigabytes: float) -> float:
    """Bytes of a GPU that is sold with so many GB, such as 79 GiB of 80."""
    return gigabytes * 79 / 80 * GIB


def machine(device: str) -> tuple[float, float, str]:
    """Bytes of a device and of the host, and where they are from: this machine, or GPU_GB.

    Raises: ValueError for a GPU_GB that is no number.
    """
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device == "cpu":
        return host, host, "this machine's"
    if given := os.environ.get("GPU_GB"):  # nor is the host known that will have one
        return usable(float(given)), math.inf, f"GPU_GB={given}"
    if found := next((gpu.total for gpu in read_gpus()), None):
        return found, host, f"this machine's GPU; its host has {host / GIB:.0f}"
    return usable(80), math.inf, "no GPU is visible: 80 GB are assumed; GPU_GB=N says otherwise"


def read_models(config: Config) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """config.json of the policy, and of the `reward model` and the `critic`, if there are any.
    Raises: ValueError if one is not on this machine."""
    parts: dict[str, Any] = {"": config.actor_rollout_ref.model}
    if config.reward_model.enable:
        parts["reward model"] = config.reward_model.model
    if config.algorithm.adv_estimator == "gae":
        parts["critic"] = config.critic.model
    found = {}
    for role, part in parts.items():
        path, override = str(part.path), part.override_config
        if (model := read_model(path)) is None:
            line = f"it needs config.json of {path}, which is not on this machine"
            on_hub = path.count("/") == 1 and path[0] not in "/.~"
            hf = Path(sys.executable).with_name("hf")
            raise ValueError(f"{line}: {hf} download {path} config.json" if on_hub else line)
        found[role] = model | override
    return found.pop(""), found


def estimate(config: Config) -> str:
    """What DRY_RUN=1 says about memory; takes neither torch nor the network."""
    device = config.trainer.device or "cuda"
    try:
        model, beside = read_models(config)
        memory, host, origin = machine(device)
        plan = Plan(config, model, device, memory, host, beside)
    except ValueError as error:
        return f"memory estimate: {error}"
    size = f"{plan.parameters / 1e9:.3g} billion parameters, {memory / GIB:.0f} GiB ({origin})"
    if plan.lora:
        dense = Plan(without_lora(config), model, device, memory, host, beside)
        need = [sum(p.training().values()) / GIB for p in (plan, dense)]
        size += f"\n  LoRA trains {plan.trainable / 1e6:.3g} million of them: a rank's training"
        size += f" takes {need[0]:.1f} GiB, and would take {need[1]:.1f} for all"
    return f"memory estimate: {size}\n{plan}"


def read_config(text: str) -> Config:
    """A resolved configuration, as DRY_RUN=1 prints it. Raises: OmegaConfBaseException."""
    from omegaconf import OmegaConf

    import verl.config.load  # noqa: F401  what stands for other keys gets its meaning there

    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    config: Any = OmegaConf.to_object(merged)
    return config  # type: ignore[no-any-return]


def main() -> None:
    """Prints the estimate; exits with 2 for what is no configuration of `main_ppo`."""
    from omegaconf.errors import OmegaConfBaseException

    parser = argparse.ArgumentParser(prog="python -m verl.tools.memory_plan", description=__doc__)
    parser.add_argument("file", nargs="?", help="resolved configuration [standard input]")
    file = parser.parse_args().file
    try:
        config = read_config(Path(file).read_text() if file else sys.stdin.read())
    except (OSError, OmegaConfBaseException) as error:
        parser.error(f"{file or 'standard input'}: {error}")
    print(estimate(config))


if __name__ == "__main__":
    main()
