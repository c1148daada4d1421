"""Keys of a model, its optimizer and its sharding, in the manner of `schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config.section import Section, number, one_of


@dataclass
class ModelConfig(Section):
    """`actor_rollout_ref.model`."""

    path: str = "Qwen/Qwen2.5-3B"
    """Hugging Face model: a folder or a name on the hub."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the model's config.json. Dropout is always off."""
    enable_gradient_checkpointing: bool = True
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    use_remove_padding: bool = True
    """Packed forward pass: tokens of all sequences in one row, no padding. False: padded rows."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""


@dataclass
class OptimConfig(Section):
    """`actor_rollout_ref.actor.optim`: AdamW and the learning-rate schedule."""

    lr: float = number(1e-6, 0)
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = number(0.01, 0)
    """AdamW's weight decay."""
    lr_warmup_steps: int = number(-1, -1)
    """Training steps of linear warm-up; -1: lr_warmup_steps_ratio decides."""
    lr_warmup_steps_ratio: float = number(0.0, 0, 1)
    """Warm-up as a share of all training steps."""
    warmup_style: str = one_of("constant", "constant", "cosine", "linear")
    """Schedule after the warm-up."""
    min_lr_ratio: float = number(0.0, 0, 1)
    """The cosine and linear schedules end at this share of lr."""


@dataclass
class MixedPrecisionConfig(Section):
    """`fsdp_config.mixed_precision`. Master parameters and optimizer states are fp32."""

    param_dtype: str | None = one_of(None, "float32", "bfloat16")
    """Compute in this type; null: bfloat16 on a GPU, float32 on a CPU."""
    reduce_dtype: str = one_of("float32", "float32", "bfloat16", "float16")
    """Reduce gradients in this type."""


@dataclass
class FSDPConfig(Section):
    """`fsdp_config` of actor and reference (PyTorch FSDP2, `fully_shard`)."""

    param_offload: bool = False
    """Keep the parameters in host memory while they are not used."""
    optimizer_offload: bool = False
    """Keep the optimizer states in host memory between updates."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward pass."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
