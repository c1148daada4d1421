"""What is asked of a Hugging Face model before anything starts, and what is kept of it."""

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import free_address, make_tiny_model, make_tokenizer
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.folder import check_model
from verl.models.hf import load_tokenizer, stop_token_ids
from verl.models.policy import PolicyWorker


def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5, 9]}))
    assert stop_token_ids(ModelConfig(path=str(folder))) == [0, 5, 9]


LIBRARY = """
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

class {name}Config(Qwen3Config):
    model_type = "{name}"

class {name}(Qwen3ForCausalLM):
    config_class = {name}Config

AutoConfig.register("{name}", {name}Config)
AutoModelForCausalLM.register({name}Config, {name})
"""


def test_libraries_that_a_model_needs_are_imported_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Mine", "Other"):
        (tmp_path / f"lib_{name}.py").write_text(LIBRARY.format(name=name))
    folder = make_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "Mine"}))
    with pytest.raises(ValueError, match="Mine"):
        check_model(ModelConfig(path=str(folder)), 64, export=True)
    check_model(ModelConfig(path=str(folder), external_lib="lib_Mine"), 64, export=True)
    assert "lib_Other" not in sys.modules
    load_tokenizer(ModelConfig(path=str(folder), external_lib=["lib_Mine", "lib_Other"]))
    assert "lib_Other" in sys.modules
    with pytest.raises(ValueError, match=r"external_lib=nowhere: No module named 'nowhere'"):
        check_model(ModelConfig(path=str(folder), external_lib="nowhere"), 64, export=True)


def test_recurrent_layers_are_refused_where_sequences_are_packed(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Lfm2Config

    config = Lfm2Config(
        vocab_size=110,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"conv.*use_remove_padding=False"):
            PolicyWorker("cpu").build(ModelConfig(str(tmp_path)), FSDPConfig(), OptimConfig(), 1)
    finally:
        dist.destroy_process_group()
