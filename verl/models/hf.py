"""Hugging Face models: configuration, weights, end-of-sequence tokens, size, inference on a CPU."""

import re
from collections.abc import Collection
from importlib import import_module
from os.path import expanduser, isdir, isfile, join
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils.logging import disable_progress_bar

from verl.config.base import ClassifierConfig
from verl.config.schema import ModelConfig
from verl.utils.flops import ModelSize, head_size
from verl.utils.hub import ask_hub

disable_progress_bar()  # one per file and process, in the middle of the log


def architecture(model: ModelConfig) -> Any:
    """The kind of model, as one of transformers' Auto classes."""
    if isinstance(model, ClassifierConfig):
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM


def load_hf_config(model: ModelConfig) -> Any:
    """The model's configuration with `override_config`, without dropout, which is chance, and what
    routers add to a loss that isn't ours. Raises: ValueError if there is no such model."""
    import_libraries(model)
    key, trust = f"{model.section}.path", model.trust_remote_code
    config = _load(AutoConfig, model.path, key, trust_remote_code=trust)
    config.update(model.override_config)
    for name in [n for n in vars(config) if n.endswith(("dropout", "_pdrop"))]:
        setattr(config, name, 0.0)
    config.get_text_config().output_router_logits = False
    return config


def import_libraries(model: ModelConfig) -> None:
    """Imports `external_lib`. Raises: ValueError for one that can't be."""
    libraries = model.external_lib or []
    for name in [libraries] if isinstance(libraries, str) else libraries:
        try:
            import_module(name)
        except ImportError as error:
            remedy = "name a module of the environment or of a folder in PYTHONPATH"
            raise ValueError(f"{model.section}.external_lib={name}: {error}; {remedy}") from error


def load_hf_model(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The whole model with its weights, on the host. Raises: ValueError if some are missing."""
    options = {"config": load_hf_config(model), "trust_remote_code": model.trust_remote_code}
    options |= {"dtype": dtype, "output_loading_info": True}
    lm, info = _load(architecture(model), model.path, f"{model.section}.path", **options)
    missing = {*info["missing_keys"]}
    for name in model.new_weights & missing:
        nn.init.zeros_(lm.get_parameter(name))
    check_names(missing - model.new_weights, info["unexpected_keys"], lm, model.path)
    return lm


def check_names(missing: Collection[str], others: Collection[str], lm: Any, path: str) -> None:
    """Raises ValueError for weights of `lm` that are missing in the files at `path`, and for
    `others` there that look like its own, such as a layer more; the rest is another model's."""

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "N", name.removeprefix(f"{lm.base_model_prefix}."))

    if missing:
        text = f"{path}: {len(missing)} weights of the model are missing, such as {min(missing)}"
        raise ValueError(text + (f"; others are there, such as {min(others)}" if others else ""))
    own = {pattern(name) for name, _ in lm.named_parameters(remove_duplicate=False)}
    if more := [name for name in others if pattern(name) in own]:
        text = f"{path}: {len(more)} weights are more than the model has, such as {min(more)}"
        raise ValueError(f"{text}: correct its config.json")


def check_split(config: Any, ranks: int, name: str) -> None:
    """Raises ValueError if a text model's sequences can't be split over so many ranks."""
    if ranks == 1:
        return
    if (heads := config.num_attention_heads) % ranks:
        raise ValueError(f"{name} has {heads} attention heads: take a number that divides them")
    positions = str(getattr(config, "rope_parameters", None))
    for kind in ("dynamic", "longrope"):  # of the longest sequence, which one rank may not see
        if f"'{kind}'" in positions:
            raise ValueError(f"{name} has {kind} positions, which need whole sequences: take 1")


def load_tokenizer(model: ModelConfig) -> Any:
    """What decides prompts, texts and stopping. Raises: ValueError if there is none."""
    import_libraries(model)
    path, key = _tokenizer(model)
    found = _load(AutoTokenizer, path, key, trust_remote_code=model.trust_remote_code)
    if not found.get_vocab().keys() - {*found.all_special_tokens}:  # made up from nothing
        classifier = isinstance(model, ClassifierConfig)
        remedy = "copy its own there" if classifier else "name another in data.tokenizer"
        raise ValueError(f"{path}: no tokenizer there: {remedy}")
    return found


def _tokenizer(model: ModelConfig) -> tuple[str, str]:
    """Where it is, and the key that says so."""
    own = model.path, f"{model.section}.path"
    return (model.tokenizer_path, "data.tokenizer") if model.tokenizer_path else own


def _load(kind: Any, path: str, key: str, **options: Any) -> Any:
    """`kind.from_pretrained`. Raises: ValueError, of one line, if there is none at `path`."""
    folder = expanduser(path)
    if not isdir(folder):
        ask_hub()
    try:
        return kind.from_pretrained(folder, **options)
    except OSError as error:
        remedy = "name a folder or a model of the hub"
        remedy += " (in scripts by MODEL_PATH)" * key.startswith("actor_rollout_ref")
        reason = f"{remedy}: {' '.join(str(error).split())}"
        raise ValueError(f"{key}={path}: no Hugging Face model there; {reason}") from error


def vocabulary_size(model: ModelConfig) -> int:
    """Ids up to the tokenizer's largest; the model may have more, which are never sampled."""
    return max(load_tokenizer(model).get_vocab().values()) + 1


def num_embeddings(model: ModelConfig) -> int:
    """Ids that the model knows."""
    return int(load_hf_config(model).get_text_config().vocab_size)


def stop_token_ids(model: ModelConfig) -> list[int]:
    """What ends a response, by tokenizer or generation_config.json. Raises: ValueError if none."""
    path, key = _tokenizer(model)
    try:
        named = _load(GenerationConfig, path, key).eos_token_id
    except ValueError:
        if isfile(join(expanduser(path), "generation_config.json")):
            raise  # there is one, but it is broken
        config = None if model.tokenizer_path else load_hf_config(model)
        named = config and GenerationConfig.from_model_config(config).eos_token_id
    named = named if isinstance(named, list) else [named]
    stop = {*named, load_tokenizer(model).eos_token_id} - {None}
    if not stop:
        problem = "neither generation_config.json nor the tokenizer names an end-of-sequence token"
        raise ValueError(f"{path}: {problem}: add eos_token_id to one of them")
    return sorted(stop)


def model_size(lm: Any) -> ModelSize | None:
    """The model's matrix products; None for experts, and without `nn.Linear` or heads."""
    config, output = lm.config.get_text_config(), lm.get_output_embeddings()
    linears = [m for m in lm.get_decoder().modules() if isinstance(m, nn.Linear)]
    heads = getattr(config, "num_attention_heads", None)
    if not (linears and heads and output) or any(
        "expert" in name for name, _ in lm.named_parameters()
    ):
        return None
    head = output.weight
    return ModelSize(
        decoder=sum(m.weight.numel() for m in linears),
        head=head.numel(),
        attention=config.num_hidden_layers * heads * head_size(config),
        per_weight=6 if head.requires_grad else 4,
    )
