"""What sections and keys are; the sections that RL and the warm-up share, and the warm-up's own."""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, dataclass_transform


@dataclass(frozen=True, slots=True)
class Rules:
    """What a key may be, and when it matters; of a section: the same for all keys in it."""

    low: float | None = None  # at least this
    high: float | None = None  # at most this
    above: float | None = None  # more than this
    choices: tuple[Any, ...] = ()  # one of these, or a list of them; empty: any
    own: bool = False  # or a function of the user's (`OWN`)
    auto: bool = False  # a number, or the word `auto`
    on_resume: str = ""
    """What a change means for a run that resumes. `error`, the default: another training. `warn`:
    changed on purpose. `free`: only speed, memory, place or rounding. `validation`: free, but
    validations can't be compared with earlier ones. `free unless CONDITION`: else an error."""
    idle_if: tuple[str, ...] = ()
    """Conditions (`Section.holds`); where one of them holds, the key has no effect."""


ANY = Rules()
FREE: dict[str, Any] = {"on_resume": "free"}
SIZE = FREE | {"low": 1}  # of speed and memory alone
NO_LORA = "lora_rank=0 and lora_adapter_path=null"
OWN_LORA = (NO_LORA, "lora_adapter_path!=null")


OWN = re.compile(r"(.+\.py):(\w+)")
"""A function of the user's, ``path/to/file.py:function``."""


def own_functions(*values: Any) -> list[str]:
    """Those of the values that are functions of the user's, each with the beginning of its file's
    SHA-256: what `algorithm.own_functions` follows."""
    found = {str(v): m for v in values if (m := OWN.fullmatch(str(v)))}
    files = {value: Path(match[1]).expanduser() for value, match in found.items()}
    hashes = {
        value: hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else "missing"
        for value, file in files.items()
    }
    return [f"{value}@{digest}" for value, digest in hashes.items()]


def key(default: Any, *, idle_if: str | tuple[str, ...] = (), **rules: Any) -> Any:
    """A key or section. `default`: its value, what makes it, or `${other.key}` (of null, too)."""
    idle = (idle_if,) if isinstance(idle_if, str) else idle_if
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"rules": Rules(idle_if=idle, **rules)})


@cache
def within(rules: Rules, section: Rules) -> Rules:
    """A key's rules, with those of its section."""
    resume = rules.on_resume or section.on_resume
    return replace(rules, on_resume=resume, idle_if=rules.idle_if + section.idle_if)


def shown(value: Any) -> str:
    """A value as users write it."""
    return "null" if value is None else str(value)


@dataclass_transform()
@dataclass
class Section:
    """A group of keys; whatever inherits from it is a dataclass. `lock` makes it read-only."""

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_locked"):
            raise AttributeError(f"the configuration is read-only after start: {name}")
        object.__setattr__(self, name, value)

    def lock(self) -> None:
        """Makes this section and all below it read-only."""
        for child in vars(self).values():
            if isinstance(child, Section):
                child.lock()
        object.__setattr__(self, "_locked", True)

    def walk(self, prefix: str = "", of: Rules = ANY) -> Iterator[tuple[str, Any, Rules]]:
        """Yields (dotted key, value, rules) for every key; `of`: those of the section."""
        for f in fields(self):
            value, rules = getattr(self, f.name), within(f.metadata.get("rules", ANY), of)
            if isinstance(value, Section):
                yield from value.walk(f"{prefix}{f.name}.", rules)
            else:
                yield prefix + f.name, value, rules

    def ending(self, name: str, near: str = "") -> dict[str, Any]:
        """The keys that `name` is an end of, and their values. At least one; only that one which is
        in the same section as the key `near`, if there is one."""
        found = keys_ending(type(self), name)  # type: ignore[arg-type]  # classes can be hashed
        assert found, f"no key ends in {name}"
        own = f"{near.rpartition('.')[0]}.{name}"
        return {k: attrgetter(k)(self) for k in ([own] if own in found else found)}

    def holds(self, condition: str, near: str = "") -> bool:
        """Whether ``end.of.key=word``, with `!=` or ` lacks ` too, all joined by ` and `; of keys
        with the same end the one that is `near`. Where a function of the user's is the value, no
        `!=` holds: it may read any key, but those of a critic."""
        for part in condition.split(" and "):
            name, sign, word = re.split("(!=|=| lacks )", part)
            values = self.ending(name, near).values()
            same = [word in v if sign == " lacks " else word == shown(v) for v in values]
            own = sign == "!=" and word != "gae" and any(OWN.fullmatch(str(v)) for v in values)
            if own or (sign == "=") not in same:
                return False
        return True


@cache
def keys_ending(kind: type[Section], name: str) -> tuple[str, ...]:
    """Keys of this class of section that end in `name`. All its instances have the same."""
    return tuple(key for key, _, _ in kind().walk() if f".{key}".endswith(f".{name}"))


@cache
def count_gpus() -> int:
    """GPUs of this machine that this process may use, found without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return sum(name.strip() not in ("", "-1") for name in visible.split(","))
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())


def default_ranks(device: str | None, rollout_gpus: int | None) -> int:
    """`trainer.n_gpus_per_node` where it is null."""
    gpus = 0 if device == "cpu" else count_gpus() - (rollout_gpus or 0)
    return gpus if gpus > 0 else min(2, os.cpu_count() or 1)


def too_many_ranks(trainer: "RunConfig") -> str | None:
    """What is wrong with `trainer.n_gpus_per_node` if this machine alone lacks the devices."""
    ranks, gpus, cores = trainer.n_gpus_per_node, count_gpus(), max(2, os.cpu_count() or 1)
    engines = getattr(trainer, "rollout_gpus_per_node", None) or 0
    most = gpus - engines if gpus else cores
    if ranks <= most or trainer.device == "cpu" or os.environ.get("RAY_ADDRESS"):
        return None
    found = f"{gpus} GPUs" if gpus else f"no GPU and {cores} cores"
    found += f", {engines} for engines alone" if gpus and engines else ""
    remedy = f"take {most} at most (in scripts by N_GPUS={most}), or a cluster (RAY_ADDRESS)"
    return f"trainer.n_gpus_per_node={ranks}, but this machine has {found}: {remedy}"


class LoraConfig(Section):
    """`model.lora`."""

    merge: bool = key(False, on_resume="free", idle_if=NO_LORA)
    """Write the final model, and hf_model of checkpoints, merged, with the adapter in the folder
    lora_adapter. Engines always get merged weights."""


class ModelConfig(Section):
    """`actor_rollout_ref.model`."""

    section = "actor_rollout_ref.model"  # what messages call it
    new_weights = frozenset[str]()  # what the files may lack, and is 0 then
    path: str = "Qwen/Qwen2.5-3B"
    """Hugging Face model: a folder or a name on the hub."""
    override_config: dict[str, Any] = key(dict)
    """Values that replace those of the model's config.json. Dropout is always off."""
    enable_gradient_checkpointing: bool = key(True, on_resume="free")
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    enable_activation_offload: bool = key(
        False, on_resume="free", idle_if="enable_gradient_checkpointing=False"
    )
    """Keep the inputs of the decoder layers in host memory until they are recomputed."""
    use_remove_padding: bool = key(True, on_resume="free")
    """Packed forward pass: tokens of all sequences in one row, no padding. False: padded rows."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""
    external_lib: Any = None
    """Module, or list of modules, to import before the model is loaded, as they register its class.
    vLLM's own workers (tensor_model_parallel_size above 1) import plugins of vLLM alone."""
    tokenizer_path: str | None = None
    """Follows data.tokenizer."""
    lora_rank: int = key(0, low=0, idle_if="lora_adapter_path!=null")
    """LoRA (arXiv 2106.09685): freeze the model and train products of this rank beside its linear
    layers; the reference is the frozen model. 0: train all weights."""
    lora_alpha: int = key(16, low=1, idle_if=OWN_LORA)
    """LoRA's products are multiplied by lora_alpha / lora_rank."""
    target_modules: Any = key("all-linear", idle_if=OWN_LORA)
    """Linear layers that LoRA trains: all-linear (the decoder's), a list of their names or of the
    ends of these, or a regular expression for whole names, as in PEFT."""
    exclude_modules: Any = key(None, idle_if=OWN_LORA)
    """Names, or a regular expression, of layers that it leaves out."""
    lora_adapter_path: str | None = None
    """Start from this adapter: a folder of PEFT or a name on the hub. Its adapter_config.json says
    rank, alpha and layers; the reference is the model without it."""
    lora: LoraConfig = key(LoraConfig)

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the model's own weights."""
        return self.lora_rank > 0 or self.lora_adapter_path is not None


class SFTModelConfig(ModelConfig):
    """`model` of the warm-up."""

    section = "model"


class ClassifierConfig(ModelConfig):
    """A sequence classifier with one label: what `reward_model.model` stands for."""

    section = "reward_model.model"


class CriticModelConfig(ClassifierConfig):
    """The same of `critic.model`, which may be a language model without that head."""

    section = "critic.model"
    new_weights = frozenset({"score.weight"})


class OptimConfig(Section):
    """`actor_rollout_ref.actor.optim`, and `optim` of the warm-up: AdamW and its schedule."""

    lr: float = key(1e-6, above=0)
    """Peak learning rate."""
    betas: list[float] = key(lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = key(0.01, low=0)
    """AdamW's weight decay."""
    eps: float = key(1e-8, above=0)
    """AdamW's ε, which is added to the root of the second moment."""
    lr_warmup_steps: int = key(-1, low=-1)
    """Training steps of linear warm-up; -1: lr_warmup_steps_ratio decides."""
    lr_warmup_steps_ratio: float = key(0.0, low=0, high=1)
    """Warm-up as a share of all training steps."""
    warmup_style: str = key("constant", choices=("constant", "cosine", "linear"))
    """Schedule after the warm-up."""
    min_lr_ratio: float = key(0.0, low=0, high=1)
    """The cosine and linear schedules fall to this share of lr."""
    num_cycles: float = key(0.5, above=0, idle_if="warmup_style!=cosine")
    """Waves of the cosine schedule; 0.5: it falls once."""


class MixedPrecisionConfig(Section):
    """`fsdp_config.mixed_precision`: in which types the passes compute."""

    param_dtype: str | None = key(None, choices=("float32", "bfloat16"))
    """Compute in this type; null: bfloat16 on a GPU, float32 on a CPU."""
    reduce_dtype: str = key("float32", choices=("float32", "bfloat16", "float16"))
    """Reduce gradients in this type."""


class FSDPConfig(Section):
    """`fsdp_config` of actor and reference: PyTorch FSDP2, `fully_shard`."""

    model_dtype: str = key("float32", choices=("float32", "bfloat16"))
    """Type of the model's parameters and, where they are trained, of gradients and AdamW's states.
    LoRA's adapters are float32."""
    param_offload: bool = key(False, on_resume="free")
    """Keep the parameters in host memory while they are not used."""
    optimizer_offload: bool = key(False, on_resume="free")
    """Keep the optimizer states in host memory between updates."""
    fsdp_size: int = key(-1, low=-1, on_resume="free")
    """Ranks that share a copy of the model; -1: all. Groups of fewer ranks hold a copy each."""
    reshard_after_forward: bool = key(True, on_resume="free")
    """Free a layer's gathered parameters after its forward pass."""
    full_determinism: bool = key(False, on_resume="free")
    """Kernels that give the same result every time, on a GPU, too: slower. PyTorch warns of those
    that it lacks. For actor and reference alike, whichever asks for it."""
    mixed_precision: MixedPrecisionConfig = key(MixedPrecisionConfig)


class TrainFilesConfig(Section):
    """What the `data` sections of RL and of the warm-up share."""

    train_files: Any = "~/data/countdown_nochat/train.parquet"
    """Training data: a path or a list of paths, of parquet, .json or .jsonl files."""
    train_max_samples: int = key(-1, low=-1)
    """Rows of them to use: the first, or with shuffle a choice by seed; -1 or 0: all."""
    tokenizer: str | None = None
    """Path of the tokenizer, which also decides how responses end; null: the model's."""
    add_bos: bool | None = None
    """Begin prompts with the beginning-of-sequence token. False: add none to what a chat template
    makes; null: as the tokenizer itself does with strings, and add none to chat messages."""
    prompt_key: str = "prompt"
    """Column with the prompt: chat messages, or a string (all that the warm-up takes)."""
    train_batch_size: int = key(32, low=1)
    """Prompts of one training step; of the warm-up: rows of one optimizer step."""
    shuffle: bool = True
    """Shuffle the rows anew in each epoch."""
    seed: int = key(1, low=0)
    """Seed of the order of the rows."""


OTHER_LOGGERS = ("mlflow", "swanlab", "trackio", "clearml", "vemlp_wandb")
LOGGERS = ("console", "wandb", "tensorboard", "file", *OTHER_LOGGERS)


class RunConfig(Section):
    """What the `trainer` sections of RL and of the warm-up share."""

    total_epochs: int = key(30, low=1, on_resume="warn")
    """Passes over the training data; with filter_groups, of one generation round per step."""
    total_training_steps: int | None = key(None, low=1, on_resume="warn")
    """Training steps; null: total_epochs decides."""
    project_name: str = "verl_examples"
    """Project in wandb, and first part of default_local_dir."""
    experiment_name: str = "gsm8k"
    """Run in wandb, and second part of default_local_dir."""
    logger: Any = key(lambda: ["console"], choices=LOGGERS)
    """A name, or a list of them. metrics.jsonl is always written."""
    nnodes: int = key(1, low=1)
    """Machines."""
    n_gpus_per_node: int = key(
        "${verl.ranks:${.device},${oc.select:trainer.rollout_gpus_per_node,null}}", low=1
    )
    """GPUs, or without any, ranks and engines of each machine; null: the GPUs of this machine that
    aren't for engines alone, without any two ranks at most."""
    device: str | None = key(None, choices=("cuda", "cpu"))
    """null: cuda where there is a GPU, else cpu."""
    max_skipped_steps: int = key(3, low=1)
    """Skipped steps in a row (loss or gradient not finite) after which the run stops."""
    hf_model_dtype: str | None = key(None, choices=("float32", "bfloat16", "float16"))
    """Type of the weights in the final model; null: as in the folder that it began from. LoRA's
    adapters are float32 then."""
    default_local_dir: str = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    """The run's folder; with several machines on a file system that all of them see."""


class RayInitConfig(Section):
    """`ray_init`."""

    num_cpus: int | None = key(None, low=1)
    """CPUs that a Ray started here offers; null: as many as are needed. Unused with RAY_ADDRESS."""
    runtime_env: dict[str, Any] = key(dict)
    """`runtime_env` of `ray.init`: env_vars, working_dir, … of all workers."""


class SFTDataConfig(TrainFilesConfig):
    """`data` of the supervised warm-up: files with a column of prompts and one of responses."""

    response_key: str = "response"
    """Column with the response string; the end-of-sequence token is appended."""
    max_length: int = key(1024, low=1)
    """Longest prompt and response together, in tokens."""
    truncation: str = key("error", choices=("error", "right"))
    """For longer rows: stop with an error, or cut the response."""
    micro_batch_size_per_gpu: int | None = key(None, low=1)
    """Rows of one forward/backward pass on a rank; null: a token budget."""
    max_token_len_per_gpu: int = key(
        "${verl.token_budget:1,${.max_length}}", low=1, idle_if="micro_batch_size_per_gpu!=null"
    )
    """That budget; null: 16384, or max_length if it is more."""


class SFTConfig(Section):
    """All keys of `verl.trainer.main_sft`."""

    data: SFTDataConfig = key(SFTDataConfig)
    model: SFTModelConfig = key(lambda: SFTModelConfig(tokenizer_path="${data.tokenizer}"))
    optim: OptimConfig = key(OptimConfig)
    fsdp_config: FSDPConfig = key(FSDPConfig)
    trainer: RunConfig = key(RunConfig)
    grad_clip: float = key(1.0, above=0)
    """Largest norm of the gradient."""
    ray_init: RayInitConfig = key(RayInitConfig)
