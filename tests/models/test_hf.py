"""What is asked of a Hugging Face model before anything starts, and what is kept of it."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers import make_tiny_model
from verl.config.schema import ModelConfig
from verl.models.folder import check_model
from verl.models.hf import load_tokenizer, stop_token_ids


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
