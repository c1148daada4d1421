"""LoRA (Hu et al., arXiv 2106.09685) by the library peft: a linear layer's frozen weight W gets a
trained product beside it, and computes with W + s·B·A, s = alpha / rank."""

from collections.abc import Iterator
from os.path import abspath, expanduser, isdir
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from verl.config.schema import ModelConfig
from verl.models.hf import load_tokenizer
from verl.utils.hub import ask_hub

FOREIGN = "base_model.model."
"""Begins all names in PEFT's files."""
SUPPORTED = {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout"}
SUPPORTED |= {"target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"}
SUPPORTED |= {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode"}
SUPPORTED |= {"peft_version", "revision", "task_type"}
"""What an adapter_config.json may set; the rest is for other adapters, or changes the model."""


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """PEFT's configuration of the adapters, that of `lora_adapter_path` if there is one; None
    without LoRA. Raises: ValueError for a path without adapter, and for other kinds of adapters."""
    if not model.uses_lora:
        return None
    if (path := model.lora_adapter_path) is None:
        options: Any = {"r": model.lora_rank, "lora_alpha": model.lora_alpha}
        options |= {"exclude_modules": model.exclude_modules, "task_type": "CAUSAL_LM"}
        return LoraConfig(target_modules=model.target_modules, **options)
    if not isdir(folder := expanduser(path)):
        ask_hub()
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        text = f"{model.section}.lora_adapter_path={path}: no adapter of PEFT there"
        raise ValueError(f"{text}: {' '.join(str(error).split())}") from error
    plain, given = LoraConfig().to_dict(), config.to_dict()
    other = [k for k, v in given.items() if k not in SUPPORTED and v != plain.get(k)]
    if other or not isinstance(config, LoraConfig):
        text = f"{path}: its adapter_config.json sets {', '.join(sorted(other))}"
        raise ValueError(f"{text}, but only plain LoRA of linear layers is supported")
    config.lora_dropout, config.inference_mode = 0.0, False
    return config


def add_adapters(lm: Any, model: ModelConfig) -> Any:
    """Freezes `lm` and puts adapters into it, fp32 whatever its own type, if there is LoRA: those
    of `lora_adapter_path`, or new ones, always the same, that leave the model what it is. On the
    device meta they get no values. Raises: ValueError for what isn't there or can't be trained."""
    if (config := lora_config(model)) is None:
        return lm
    device = next(lm.parameters()).device
    if config.target_modules == "all-linear":
        config.target_modules = _all_linear(lm)
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(config, lm)
        except ValueError as error:
            keys = f"{model.section}.target_modules or exclude_modules"
            raise ValueError(f"{keys}: {error}") from error
    for parameter in adapters(lm).values():
        parameter.data = parameter.data.float()
    head = lm.get_output_embeddings()
    for name, module in lm.named_modules():
        fits = type(module) is Linear and module is not head
        if isinstance(module, LoraLayer) and not (fits and _is_linear(module.get_base_layer())):
            problem = f"{name} can't have an adapter; name linear layers of the decoder, such as "
            problem += "[q_proj,k_proj,v_proj,o_proj]"
            raise ValueError(f"{model.section}.target_modules={model.target_modules}: {problem}")
    if path := model.lora_adapter_path:
        saved, own = load_peft_weights(expanduser(path), device="cpu"), adapters(lm)
        shapes = [{name: w.shape for name, w in one.items()} for one in (saved, own)]
        if wrong := {name for name, _ in shapes[0].items() ^ shapes[1].items()}:
            problem = f"{len(wrong)} weights don't fit the model, such as {min(wrong)}"
            raise ValueError(f"{model.section}.lora_adapter_path={path}: {problem}")
        for name, parameter in own.items():
            parameter.data.copy_(saved[name])
    return lm


def _all_linear(lm: Any) -> list[str]:
    """Linear layers of the decoder, not of what sees images. Beside experts, whose weights are
    stacked, without those that PEFT would take for theirs, as they have the same names."""
    inside = {*lm.get_decoder().modules()} - {lm.get_output_embeddings()}
    experts = any("experts" in name and p.dim() == 3 for name, p in lm.named_parameters())
    taken = (".gate_proj", ".up_proj", ".down_proj") if experts else ()
    named = [name for name, m in lm.named_modules() if m in inside and _is_linear(m)]
    return [name for name in named if not name.endswith(taken)]


def _is_linear(module: nn.Module) -> bool:
    """Whether it returns a product; routers of experts do more."""
    return isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__


def adapters(lm: nn.Module) -> dict[str, nn.Parameter]:
    """All A [rank, in] and B [out, rank], by their names in PEFT's files."""
    parameters = lm.named_parameters()
    found = {name: p for name, p in parameters if ".lora_A." in name or ".lora_B." in name}
    return {FOREIGN + name.replace(".default.", "."): p for name, p in found.items()}


def plain_parameters(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of the model without adapters, tied ones once, by their names there."""
    trained = set(adapters(lm).values())
    for name, parameter in lm.named_parameters():
        if parameter not in trained:
            yield name.replace(".base_layer.", "."), parameter


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered from all ranks if it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def merged_weight(lm: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name` of the model without adapters, gathered, plus s·B·A if it has
    adapters."""
    place, _, leaf = name.rpartition(".")
    module = lm.get_submodule(place)
    if not isinstance(module, Linear):
        return whole(getattr(module, leaf))
    weight = whole(module.get_base_layer().get_parameter(leaf))
    if leaf != "weight":
        return weight
    parts = module.lora_B, module.lora_A
    b, a = (whole(part["default"].get_parameter("weight")) for part in parts)
    product = b @ a
    return weight + (product.T if module.fan_in_fan_out else product) * module.scaling["default"]


def write_adapter(
    lm: Any, model: ModelConfig, folder: str | Path, weights: dict[str, Tensor], dtype: str | None
) -> None:
    """Writes `weights`, named as in `adapters`, as PEFT's `PeftModel.from_pretrained` reads them,
    and the tokenizer; as `dtype`, or fp32."""
    config: LoraConfig = lm.peft_config["default"]
    path = expanduser(model.path)
    config.base_model_name_or_path = abspath(path) if isdir(path) else path
    config.save_pretrained(str(folder))
    kind = getattr(torch, dtype or "float32")
    tensors = {name: w.to(kind).contiguous() for name, w in weights.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    load_tokenizer(model).save_pretrained(folder)
