"""Keys of the supervised warm-up, in the manner of `schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config.model_schema import FSDPConfig, ModelConfig, OptimConfig
from verl.trainer.config.schema import RayInitConfig, RunConfig
from verl.trainer.config.section import Section, number, one_of


@dataclass
class SFTDataConfig(Section):
    """`data` of the supervised warm-up: parquet with a prompt and a response column."""

    train_files: Any = "~/data/sft.parquet"
    """A path or a list of paths."""
    tokenizer: str | None = None
    """Tokenizer path; null: the model's."""
    prompt_key: str = "prompt"
    """Column with the prompt string (not learned)."""
    response_key: str = "response"
    """Column with the response string; the end-of-sequence token is appended."""
    max_length: int = number(1024, 1)
    """Longest prompt and response together, in tokens."""
    truncation: str = one_of("error", "error", "right")
    """For longer rows: stop with an error, or cut the response."""
    train_batch_size: int = number(256, 1)
    """Rows of one optimizer step."""
    micro_batch_size_per_gpu: int | None = number(None, 1)
    """Rows of one forward/backward pass on a rank; null: max_token_len_per_gpu decides."""
    max_token_len_per_gpu: int = number(16384, 1)
    """Token budget of a micro-batch."""
    shuffle: bool = True
    """Shuffle the rows anew in each epoch."""
    seed: int = number(1, 0)
    """Seed of the order."""


@dataclass
class SFTTrainerConfig(RunConfig):
    """`trainer` of the supervised warm-up."""

    total_epochs: int = number(1, 1)
    """Passes over the rows."""
    project_name: str = "sft"
    """Project in wandb, and first part of default_local_dir."""
    experiment_name: str = "warm-up"
    """Run in wandb, and second part of default_local_dir."""
    logger: Any = field(default_factory=lambda: ["console"])
    """Any of console, wandb, tensorboard, file. metrics.jsonl is always written."""


@dataclass
class SFTConfig(Section):
    """All keys of `verl.trainer.main_sft`."""

    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    grad_clip: float = number(1.0, 0)
    """Largest norm of the gradient."""
    ray_init: RayInitConfig = field(default_factory=RayInitConfig)
