"""What is looked at in a model's folder before anything starts, and what an export holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers import VOCABULARY, free_address, make_tiny_model, make_tokenizer
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.folder import check_model, check_weights, write_folder
from verl.models.hf import load_hf_model, stop_token_ids
from verl.models.policy import PolicyWorker

Weights = dict[str, Tensor]


def changed(folder: Path, change: Callable[[Weights], Weights], **options: object) -> ModelConfig:
    """A tiny model with other weights in its file."""
    file = make_tiny_model(folder, **options) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return ModelConfig(path=str(folder))


def test_models_that_cannot_work_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"/nowhere: no Hugging Face model there"):
        check_model(ModelConfig(path="/nowhere"), 10, export=False)
    model = ModelConfig(path=str(make_tiny_model(tmp_path)))
    check_model(model, 512, export=True)
    assert not caplog.records
    check_model(model, 513, export=True)
    assert "513 tokens are longer than the 512 positions" in caplog.text
    check_model(model, 10, False, {"a.key": 2})
    with pytest.raises(ValueError, match=r"a\.key=4: .* has 2 attention heads: take a number"):
        check_model(model, 10, False, {"other.key": 1, "a.key": 4})
    for kind in ("dynamic", "longrope"):
        model.override_config = {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
        with pytest.raises(ValueError, match=rf"a\.key=2: .* has {kind} positions, .*: take 1"):
            check_model(model, 10, False, {"a.key": 2})
    model.override_config = {}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        check_model(model, 10, export=True)


LONGROPE = {"long_factor": [2.0] * 16, "short_factor": [1.0] * 16}


@pytest.mark.parametrize(
    ("kind", "rope", "options", "limit"),
    [
        ("Llama", {"rope_type": "dynamic", "factor": 2.0}, {}, 512),
        (
            "Phi3",
            LONGROPE | {"rope_type": "longrope"},
            {"original_max_position_embeddings": 64},
            64,
        ),
    ],
)
def test_rotary_embeddings_that_change_with_the_batch_are_refused(
    kind: str, rope: dict[str, object], options: dict[str, int], limit: int, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path, kind, rope_parameters=rope | {"rope_theta": 1e4}, **options)
    model = ModelConfig(path=str(tmp_path))
    check_model(model, limit, export=False)
    with pytest.raises(ValueError, match=rf"beyond {limit} tokens, {rope['rope_type']} rotary"):
        check_model(model, limit + 1, export=False)


ROW = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k.replace("model.layers.1", "other.layers.1"): v for k, v in w.items()},
            "11 weights of the model are missing, such as model.layers.1.input_layernorm.weight; "
            "others are there, such as other.layers.1.input_layernorm.weight",
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"},
            "1 weights of the model are missing, such as lm_head.weight",
        ),
        (
            lambda w: w | {k.replace("layers.1", "layers.2"): v.clone() for k, v in w.items()},
            "11 weights are more than the model has, such as ",
        ),
        (
            lambda w: w | {ROW: torch.zeros(3, 3)},
            f"model.safetensors: {ROW} has the shape [3, 3], but config.json says [96, 64]",
        ),
    ],
    ids=["another prefix", "no head", "a layer more", "another shape"],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    model = changed(tmp_path, change, tie_word_embeddings=False)
    with pytest.raises(ValueError) as before:
        check_weights(model)
    assert str(tmp_path) in str(before.value) and message in str(before.value)
    if "shape" not in message:  # transformers refuses those itself
        with pytest.raises(ValueError) as loading:
            load_hf_model(model, torch.float32)
        assert str(loading.value).split(" weights")[0] == str(before.value).split(" weights")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w,
        lambda w: {k.removeprefix("model."): v for k, v in w.items()},
        lambda w: w | {"v_head.weight": torch.zeros(3), "visual.blocks.0.weight": torch.zeros(3)},
        lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()},
    ],
    ids=["as written", "the decoder alone", "another model's part", "tied, stored twice"],
)
def test_weights_that_fit_are_loaded(tmp_path: Path, change: Callable[[Weights], Weights]) -> None:
    model = changed(tmp_path, change)
    check_weights(model)
    assert load_hf_model(model, torch.float32) is not None


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    model, whole = ModelConfig(path=str(tmp_path)), file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read .*: download it again"):
        check_weights(model)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of git-lfs: run"):
        check_weights(model)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {ROW: "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_weights(model)


def export(model: ModelConfig, folder: Path, dtype: str | None = None) -> None:
    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    try:
        worker = PolicyWorker("cpu")
        worker.build(model, FSDPConfig(), OptimConfig(), 1)
        worker.save_hf(folder, dtype)
    finally:
        dist.destroy_process_group()


def test_an_export_is_the_models_folder_with_other_weights(tmp_path: Path) -> None:
    """Its type, its dropout, a generation configuration that transformers would not write, what
    belongs to a processor; and code, but no weights of another format."""
    source = make_tiny_model(tmp_path / "before", attention_dropout=0.1, dtype="bfloat16")
    lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    lm.save_pretrained(source)
    invalid = '{"eos_token_id": [0, 5], "temperature": 0.7, "top_p": 0.8}'
    texts = {"generation_config.json": invalid, "preprocessor_config.json": "{}", "model.py": "#"}
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_bytes(b"old")
    model = ModelConfig(str(source), override_config={"rope_theta": 5000.0})
    export(model, tmp_path / "after")
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "after").iterdir()} == names
    for name, text in texts.items():
        assert (tmp_path / "after" / name).read_text() == text
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "after")
    )
    assert after == before | {"rope_theta": 5000.0} and after["attention_dropout"] == 0.1
    old, new = (load_file(f / "model.safetensors") for f in (source, tmp_path / "after"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) and new[k].dtype == torch.bfloat16 for k in old)
    assert stop_token_ids(ModelConfig(str(tmp_path / "after"))) == [0, 5]


def test_an_export_can_have_another_type(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "before")
    export(ModelConfig(str(source)), tmp_path / "after", "float16")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["dtype"] == "float16"
    weights = load_file(tmp_path / "after" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}


def test_a_mask_in_the_files_is_not_the_type_of_the_weights(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "before")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights = {name: w.half() for name, w in weights.items()} | {"a.mask": torch.ones(2).byte()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    write_folder(ModelConfig(str(source)), tmp_path / "after", {}, None)
    assert json.loads((tmp_path / "after" / "config.json").read_text())["dtype"] == "float16"


def test_an_export_has_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    source, tokenizer = make_tiny_model(tmp_path / "before"), make_tokenizer()
    tokenizer.eos_token = VOCABULARY[12]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = ModelConfig(str(source), tokenizer_path=str(tmp_path / "tokenizer"))
    (source / "chat_template.jinja").write_text("another's")
    write_folder(model, tmp_path / "after", {}, None)
    assert stop_token_ids(model) == stop_token_ids(ModelConfig(str(tmp_path / "after"))) == [12]
    assert not (tmp_path / "after" / "chat_template.jinja").exists()


def test_what_an_export_can_not_write_is_found_before_the_run(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "before")
    broken = source / "chat_template.jinja"
    broken.symlink_to(tmp_path / "nowhere")
    check_model(ModelConfig(str(source)), 10, export=False)
    with pytest.raises(OSError, match=r"nowhere|chat_template"):
        check_model(ModelConfig(str(source)), 10, export=True)
