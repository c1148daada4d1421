"""A quick part of the sweep, and what is refused before anything starts."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers import make_samples, make_step
from tests.models.families import make_family
from tests.models.sweep import (
    EXACT,
    LENGTHS,
    LIMIT,
    actor_difference,
    build,
    engine_difference,
    one_rank,
)
from tests.models.sweep import main as sweep
from verl.algorithms.losses import LossConfig
from verl.config.schema import ModelConfig
from verl.models import packing
from verl.models.folder import check_model, skeleton
from verl.models.logprobs import scale_and_cap
from verl.protocol import Prompt, Sample
from verl.rollout.hf import HFEngine
from verl.rollout.vllm import VLLMEngine


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "family",
    # Caps of scores and logits; a scale; sinks; a cap in `text_config`; windows in masks alone.
    ["Gemma 2", "Cohere", "GPT-OSS", "Gemma 4", "Qwen2-MoE, windows"],
)
def test_an_actor_computes_what_transformers_computes(
    family: str, packed: bool, tmp_path: Path
) -> None:
    assert actor_difference(make_family(family, tmp_path), packed) < EXACT


@pytest.mark.parametrize("family", ["PhiMoE", "Gemma 2"])  # noise of a router and its own loss
def test_an_engine_is_the_actor(family: str, tmp_path: Path) -> None:
    assert engine_difference(make_family(family, tmp_path), "hf") < EXACT


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Llama", (1, None)),
        ("Cohere", (0.25, None)),
        ("Granite", (0.25, None)),  # divided by 4
        ("MiniCPM3", (0.5, None)),  # of hidden states: dim_model_base / hidden_size
        ("Gemma 4", (1, 2)),
        ("GPT-J", (1, None)),
    ],
)
def test_scales_and_caps_are_measured(
    family: str, expected: tuple[float, float | None], tmp_path: Path
) -> None:
    lm = skeleton(ModelConfig(path=str(make_family(family, tmp_path))))
    assert scale_and_cap(lm) == pytest.approx(expected)


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    lm = skeleton(ModelConfig(path=str(make_family("Granite", tmp_path))))
    lm.register_forward_hook(lambda *args: SimpleNamespace(logits=args[2].logits ** 3))
    with pytest.raises(ValueError, match="no head that scales or caps"):
        scale_and_cap(lm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_ends_where_the_attention_is_wrong(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that see each other, and a window that isn't there."""
    right, folder = packing.packed_attention, make_family("Mistral", tmp_path)
    build(folder, dtype=dtype)

    def mixes(*args: torch.Tensor, **options: object) -> object:
        return right(*args, **options | {"sequence_lengths": [sum(options["sequence_lengths"])]})

    def sees_all(*args: torch.Tensor, **options: object) -> object:
        return right(*args[:4], None, **options | {"sliding_window": None})

    for wrong in (mixes, sees_all):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_attention", wrong)
        with pytest.raises(ValueError, match=r"packed, .* mistral model differ by 0\.\d+ nats"):
            build(folder, dtype=dtype)


def test_a_prompt_is_computed_for_each_response_where_sharing_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, right = make_family("Mistral", tmp_path), packing.over_ranks
    assert build(folder).shares and not caplog.records

    def misplaced(*args: torch.Tensor, **options: Any) -> object:
        if "key_index" in options:
            options["key_index"] = options["key_index"].flip(0)
        return right(packing.packed_attention, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_attention", misplaced)
    policy = build(folder)
    assert not policy.shares and "prompts are computed for each response" in caplog.text
    prompt, ids = Prompt(0, np.arange(5), "", None), np.arange(3)
    batch = policy.pack([Sample(prompt, 0, ids, "stop") for _ in range(2)])
    assert batch.input_ids.numel() == 14 and "key_index" not in batch.model_kwargs


@pytest.mark.parametrize(
    ("family", "packed", "message"),
    [
        ("Jamba", True, r"jamba model .*\(linear_attention\): set .*use_remove_padding=False"),
        ("LFM2", True, r"lfm2 model .*\(conv\): set .*use_remove_padding=False"),
        ("Falcon-H1", True, r"falcon_h1 model .*\(hybrid\): set .*use_remove_padding=False"),
        ("BLOOM", True, "bloom model .*an attention of its own.*use_remove_padding=False"),
        ("StableLM", True, "stablelm model can't run packed .*: set .*use_remove_padding=False"),
        ("Doge", False, "doge model chooses the tokens it sees by the whole batch"),
        ("Mamba", False, "mamba model has no attention"),
        ("Mamba 2", False, "mamba2 model has no attention"),
        ("RWKV", False, "rwkv model has no attention"),
        ("Llama 4", False, "llama4_text model does not name its decoder"),
        ("Qwen2.5-VL", False, "qwen2_5_vl model is none of text alone"),
    ],
)
def test_what_is_refused_in_one_line(
    family: str, packed: bool, message: str, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(make_family(family, tmp_path)), use_remove_padding=packed)
    with pytest.raises(ValueError, match=message) as error:
        check_model(model, 64, export=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "kind"), [("Jamba", "linear_attention"), ("LFM2", "conv")])
def test_the_hf_engine_refuses_recurrent_layers(family: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"\({kind}\): set .*rollout\.name=vllm"):
        HFEngine.check(ModelConfig(path=str(make_family(family, tmp_path))))


def test_vllm_is_refused_where_it_keeps_old_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gpt_oss model's experts .*: set .*rollout\.name=hf"):
        VLLMEngine.check(ModelConfig(path=str(make_family("GPT-OSS", tmp_path / "sinks"))))
    VLLMEngine.check(ModelConfig(path=str(make_family("Mixtral", tmp_path / "none"))))


@pytest.mark.parametrize(
    ("family", "remedy"),
    [
        ("DBRX", r"set .*rollout\.name=hf"),
        ("MiniMax-M2", r"set .*rollout\.name=hf"),
        ("Qwen3-Next", "use vLLM on GPUs"),
        ("Qwen3.5, text", "use vLLM on GPUs"),
        ("LFM2", "use vLLM on GPUs"),
        ("Jamba", "use vLLM on GPUs"),
    ],
)
def test_vllm_for_cpus_is_refused_where_it_runs_no_such_model(
    family: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(make_family(family, tmp_path)))
    monkeypatch.setattr(
        "verl.rollout.vllm.distributions", lambda name: [name] * name.endswith("cpu")
    )
    with pytest.raises(ValueError, match=rf"vLLM for CPUs can't run a \w+ model: {remedy}$"):
        VLLMEngine.check(model)
    monkeypatch.setattr("verl.rollout.vllm.distributions", lambda name: [])
    VLLMEngine.check(model)


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3", "Apertus", "GPT-OSS"])
def test_what_is_sent_is_what_a_checkpoint_holds(family: str, tmp_path: Path) -> None:
    """Names, shapes and values; buffers too."""
    folder = make_family(family, tmp_path)
    worker, sent = build(folder), {}
    for chunk in worker.plan_export(None, 20_000, stored=True)[1]:
        tensors = worker.export(chunk, "host").tensors
        assert tensors is not None and [[*t.shape] for t in tensors] == chunk.shapes
        sent |= dict(zip(chunk.names, tensors, strict=True))
    stored = load_file(folder / "model.safetensors")
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[name], value) for name, value in stored.items())


def test_a_model_with_images_is_trained_resumed_and_exported(tmp_path: Path) -> None:
    """Its text alone: what belongs to images stays as it is."""
    folder = make_family("Gemma 3", tmp_path / "before")
    (folder / "preprocessor_config.json").write_text("{}")
    worker = build(folder)
    before = {n: p.full_tensor().clone() for n, p in worker.model.lm.named_parameters()}
    worker.update([make_step(make_samples(LENGTHS))], LossConfig(), LIMIT, 1.0)
    after = {n: p.full_tensor().clone() for n, p in worker.model.lm.named_parameters()}
    changed = {n.split(".")[1] for n in after if not torch.equal(before[n], after[n])}
    assert changed == {"language_model"}
    worker.save(tmp_path / "checkpoint")
    resumed = build(folder)
    resumed.load(tmp_path / "checkpoint")
    step = make_step(make_samples(LENGTHS, seed=1))
    for one in (worker, resumed):
        one.update([step], LossConfig(), LIMIT, 1.0)
    pairs = zip(worker.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)
    resumed.save_hf(tmp_path / "after")
    assert (tmp_path / "after" / "preprocessor_config.json").exists()
    files = [load_file(f / "model.safetensors") for f in (folder, tmp_path / "after")]
    assert files[0].keys() == files[1].keys()
    samples = make_samples(LENGTHS)
    ours = resumed.log_probs(samples, 1.0, LIMIT)
    again = build(tmp_path / "after").log_probs(samples, 1.0, LIMIT)
    np.testing.assert_allclose(ours, again, atol=EXACT)


def test_noise_and_losses_of_routers_are_off(tmp_path: Path) -> None:
    worker = build(make_family("Mixtral", tmp_path))
    assert not worker.model.lm.config.output_router_logits
    gates = [m for m in worker.model.modules() if hasattr(m, "jitter_noise")]
    assert gates and not any(m.training for m in gates)
    assert any(m.training for m in worker.model.modules())  # gradient checkpointing


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    sweep(["Jamba", "Mamba"], engines=[])
    text = capsys.readouterr().out
    assert "| Jamba | no | yes | no | – |\n| Mamba | no | no | – | – |" in text
    assert "* Jamba, packed: a jamba model has layers that mix packed sequences" in text
