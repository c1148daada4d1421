"""What is asked of a Hugging Face model before anything starts, and what is kept of it."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import free_address, make_tiny_model, make_tokenizer
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.hf import stop_token_ids
from verl.models.policy import PolicyWorker


def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5, 9]}))
    assert stop_token_ids(ModelConfig(path=str(folder))) == [0, 5, 9]


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
