"""A model's folder: what its files hold, and how that of a trained one is written."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import cached_file

from verl.config.schema import ModelConfig
from verl.models.guard import check_family
from verl.models.hf import (
    architecture,
    check_names,
    check_split,
    load_hf_config,
    load_tokenizer,
    stop_token_ids,
)
from verl.models.logprobs import PolicyModel
from verl.models.lora import add_adapters

logger = logging.getLogger(__name__)

TOKENIZER = re.compile(r"tokenizer|(special|added)_tokens|vocab|merges|chat_template|generation_")
EXPORTED = (torch.float32, torch.bfloat16, torch.float16)
COPIED = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}


def skeleton(model: ModelConfig, **options: Any) -> Any:
    """The model without memory for its weights. Raises: ValueError for one of another kind."""
    options["trust_remote_code"] = model.trust_remote_code
    config, kind = load_hf_config(model), architecture(model)
    own = kind.__name__ in getattr(config, "auto_map", {})
    if type(config) not in kind._model_mapping and not own:
        problem = f"a {config.model_type} model is none of text alone, which is all that is trained"
        raise ValueError(f"{model.path}: {problem}")
    with torch.device("meta"):
        return kind.from_config(config, **options)


def model_folder(model: ModelConfig) -> Path:
    """Where the model's files are; of a model of the hub, the cache."""
    path = Path(model.path).expanduser()
    return path if path.is_dir() else Path(str(cached_file(model.path, "config.json"))).parent


def check_model(
    model: ModelConfig, longest: int, export: bool, split: Mapping[str, int] | None = None
) -> None:
    """Downloads the policy's model, if it is one of the hub. `split`: keys, and over how many ranks
    they split sequences. Raises: ValueError for what would stop workers later or (`export`) the end
    of the run."""
    config = load_hf_config(model)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    for key, ranks in (split or {}).items():
        check_split(text, ranks, f"{key}={ranks}: {model.path}")
    fetch(model, longest)
    if min(stop_token_ids(model)) >= (size := text.vocab_size):
        raise ValueError(f"{model.path} has {size} tokens, and the tokenizer's end is none of them")
    for rope in (ropes, *ropes.values()):  # of all layers or, by name, of some
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        if longest > (limit := rope.get("original_max_position_embeddings", positions)):
            problem = f"{kind} rotary embeddings of a batch depend on its longest sequence"
            remedy = f"make prompts and responses no longer, now {longest}"
            raise ValueError(f"{model.path}: beyond {limit} tokens, {problem}: {remedy}")
    check_weights(model)
    check_family(lm := skeleton(model), model)
    PolicyModel(lm)
    add_adapters(lm, model)
    if export:
        with TemporaryDirectory() as place:
            write_folder(model, place, {}, None)


def fetch(model: ModelConfig, longest: int) -> None:
    """Downloads a model of the hub, which takes longer than workers wait for each other; warns if
    it was made for fewer than `longest` tokens. Raises: ValueError for a folder without weights."""
    positions = getattr(load_hf_config(model), "max_position_embeddings", None)
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        patterns = [f"*{end}" for end in (*COPIED, ".safetensors")]
        snapshot_download(model.path, allow_patterns=patterns)
    elif not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{model.section}.path={model.path}: the folder holds no weights")
    if positions and longest > positions:
        note = "prompts and responses of %d tokens are longer than the %d positions %s was made for"
        logger.warning(note, longest, positions, model.path)


def check_weights(model: ModelConfig) -> None:
    """Compares the headers of the safetensors files with the model. Raises: ValueError for a file
    that can't be read, and for weights that are missing, left over, or of another shape."""
    found: dict[str, tuple[Path, list[int]]] = {}
    folder = model_folder(model)
    index, paths = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file() and not paths[0].is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
    if absent := [path for path in paths if not path.is_file()]:
        if index.is_file() and Path(model.path).expanduser().is_dir():
            problem = f"{absent[0]} is missing, but {index.name} names it"
            raise ValueError(f"{problem}: download it again")
        paths = []  # of another format, or still to be downloaded
    for path in [*paths, *sorted(folder.glob("*.bin"))]:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                remedy = "run `git lfs pull` in its folder"
                raise ValueError(f"{path} is a pointer of git-lfs: {remedy}")
    for path in paths:
        try:
            with safe_open(path, "pt") as opened:
                found |= {k: (path, opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read ({error}): download it again") from None
    lm = skeleton(model)
    if not found or get_checkpoint_conversion_mapping(lm.config.model_type):
        return
    prefix = f"{lm.base_model_prefix}."  # which the files may lack
    parameters = lm.named_parameters(remove_duplicate=False)
    own = {name.removeprefix(prefix): parameter for name, parameter in parameters}
    there, others = set(), []  # parameters, of which tied ones have several names
    for name, (place, shape) in found.items():
        parameter = own.get(name.removeprefix(prefix))
        if parameter is None:
            others.append(name)
        elif shape != (size := [*parameter.shape]):
            raise ValueError(f"{place}: {name} has the shape {shape}, but config.json says {size}")
        else:
            there.add(parameter)
    missing = {name for name, parameter in lm.named_parameters() if parameter not in there}
    check_names(missing - model.new_weights, others, lm, model.path)


def write_folder(
    model: ModelConfig, folder: str | Path, weights: dict[str, Tensor], dtype: str | None
) -> None:
    """Writes the model's own folder with other weights, as `dtype`; None: of its own type. Raises:
    OSError if it can't be written."""
    source, target = model_folder(model), Path(folder)
    config = json.loads((source / "config.json").read_text())
    kind = getattr(torch, dtype) if dtype else load_hf_config(model).dtype or _stored_type(source)
    shell = skeleton(model)
    shell.generation_config = GenerationConfig()  # the model's own file may be invalid
    own, buffers = (dict(x) for x in (shell.named_parameters(), shell.named_buffers()))
    state = {n: w for n, w in weights.items() if n in buffers}
    state |= {n: w.to(kind) for n, w in weights.items() if n in own}  # of tied ones, one
    try:
        shell.save_pretrained(target, state_dict=state)
    except SafetensorError as error:
        raise OSError(f"{target}: {error}") from None
    (target / "generation_config.json").unlink(missing_ok=True)
    other = model.tokenizer_path is not None
    for file in source.iterdir():
        left_out = file.name.endswith(".index.json") or (other and TOKENIZER.match(file.name))
        if file.suffix in COPIED and not left_out:
            shutil.copyfile(file, target / file.name)
    config.pop("torch_dtype", None)  # an older name
    config |= {**model.override_config, "dtype": str(kind).removeprefix("torch.")}
    if other:
        tokenizer = load_tokenizer(model)
        tokenizer.save_pretrained(target)
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ids["eos_token_id"] = stop_token_ids(model)
        config |= ids
        GenerationConfig(**ids).save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _stored_type(folder: Path) -> torch.dtype:
    """Type of the first weight in the folder's files; some hold masks, too."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                if (stored := file.get_tensor(name).dtype) in EXPORTED:
                    return stored
    return torch.float32
