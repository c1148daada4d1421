"""Shapes of a model's parameters and of LoRA's, from its config.json and the run's keys; takes
neither torch nor the network."""

import json
import re
from pathlib import Path
from typing import Any

from verl.config.base import ModelConfig

Shapes = list[tuple[int, int]]

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are known here."""


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
    root = [(V, H), (H, 1)]
    if not model.get("tie_word_embeddings", False):
        root.append((V, H))
    layer = [(A, H), (K, H), (K, H), (H, A), (inner, H), (inner, H), (H, inner), (H, 1), (H, 1)]
    if model.get("attention_bias", kind == "qwen2"):
        layer += [(A, 1), (K, 1), (K, 1)]
    if kind == "qwen3":  # norms of queries and keys
        layer += [(size, 1), (size, 1)]
    return root, layer


def numbers(shapes: Shapes) -> int:
    """In tensors of these (rows, columns)."""
    return sum(rows * columns for rows, columns in shapes)


LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEARS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
"""Names of a layer's first parameters, in the order of `weight_shapes`."""


def adapter_shapes(model: ModelConfig, layer: Shapes, layers: int) -> Shapes:
    """(rows, columns) of all that LoRA trains in so many layers; empty without LoRA. Raises:
    ValueError if adapter_config.json of `lora_adapter_path` is not on this machine."""
    rank, chosen, excluded = model.lora_rank, model.target_modules, model.exclude_modules
    if path := model.lora_adapter_path:
        if (found := read_model(path, "adapter_config.json")) is None:
            raise ValueError(f"it needs adapter_config.json of {path}, which is not here")
        rank, chosen, excluded = found["r"], found["target_modules"], found.get("exclude_modules")
    if not rank:
        return []

    def matches(name: str, names: Any) -> bool:  # as in PEFT
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(f".{name}".endswith(f".{end}") for end in names or ())

    chosen = ".*" if chosen == "all-linear" else chosen
    shapes = []
    for number in range(layers):
        for end, (rows, columns) in zip(LINEARS, layer, strict=False):
            name = f"model.layers.{number}.{end}"
            if matches(name, chosen) and not matches(name, excluded):
                shapes += [(rank, columns), (rows, rank)]
    return shapes


def read_model(path: str, name: str = "config.json") -> dict[str, Any] | None:
    """This file of a folder or of a model in the hub's local cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file: Any = Path(path).expanduser() / name
    if not file.is_file():
        try:
            file = try_to_load_from_cache(path, name)
        except HFValidationError:  # no name of the hub
            return None
    return json.loads(Path(file).read_text()) if isinstance(file, str | Path) else None
