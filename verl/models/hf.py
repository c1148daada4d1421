"""Hugging Face models: configuration, weights, end-of-sequence tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl.trainer.config.model_schema import ModelConfig

logger = logging.getLogger(__name__)

# Heads that scale or cap their logits need more than a matrix product.
UNSUPPORTED_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def load_hf_config(model: ModelConfig) -> Any:
    """The model's configuration with `override_config`; dropout is off, since log-probabilities
    must not depend on chance.

    Raises: ValueError if there is no such model, or its head isn't a plain matrix product.
    """
    try:
        path = _path(model.path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"actor_rollout_ref.model.path={model.path}: no Hugging Face model there; name a "
            f"folder or a model of the hub (in scripts by MODEL_PATH)\n{error}"
        ) from error
    config.update(model.override_config)
    for name in [n for n in vars(config) if n.endswith(("dropout", "_pdrop"))]:
        setattr(config, name, 0.0)
    for name in UNSUPPORTED_HEADS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{model.path}: models with {name} are not supported")
    return config


def load_hf_model(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The whole model with its weights, on the host."""
    return AutoModelForCausalLM.from_pretrained(
        _path(model.path),
        config=load_hf_config(model),
        dtype=dtype,
        trust_remote_code=model.trust_remote_code,
    )


def load_generation_config(model: ModelConfig) -> Any:
    """The model's generation_config.json, or what its config.json says where there is none."""
    try:
        return GenerationConfig.from_pretrained(_path(model.path))
    except OSError:
        return GenerationConfig.from_model_config(load_hf_config(model))


def load_tokenizer(model: ModelConfig, path: str | None = None) -> Any:
    """The tokenizer at `path`; None: the model's own."""
    path = _path(path or model.path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)


def stop_token_ids(model: ModelConfig) -> list[int]:
    """End-of-sequence tokens: those of the generation configuration and the tokenizer's.

    Raises: ValueError if neither names one.
    """
    named = load_generation_config(model).eos_token_id
    named = named if isinstance(named, list) else [named]
    stop = {*named, load_tokenizer(model).eos_token_id} - {None}
    if not stop:
        raise ValueError(
            f"{model.path}: neither generation_config.json nor the tokenizer names an "
            "end-of-sequence token: add eos_token_id to one of them"
        )
    return sorted(stop)


def check_model(model: ModelConfig, longest: int) -> None:
    """Raises ValueError for what would stop the workers later: no model, no weights, no
    end-of-sequence token. Warns if `longest`, the tokens of prompt and response together, is more
    than the model has positions for."""
    config = load_hf_config(model)
    folder = Path(model.path).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"actor_rollout_ref.model.path={model.path}: the folder holds no weights")
    stop_token_ids(model)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        logger.warning(
            f"prompts and responses of {longest} tokens are longer than the {positions} positions "
            f"{model.path} was made for"
        )


def _path(path: str) -> str:
    return str(Path(path).expanduser())
