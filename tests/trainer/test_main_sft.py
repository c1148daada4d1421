"""The supervised warm-up end to end: real Ray, FSDP2 on two ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.config.load import load_config
from verl.trainer import main_sft


def settings(model: Path, folder: Path, *overrides: str) -> list[str]:
    rows = [{"prompt": f"{i} + 1 =", "response": f"{i + 1}"} for i in range(1, 9)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sft.parquet")
    return [
        f"data.train_files={folder}/sft.parquet",
        f"model.path={model}",
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=3",
        "data.max_length=8",
        "optim.lr=1e-2",
        "trainer.n_gpus_per_node=2",
        f"trainer.default_local_dir={folder}/run",
        *overrides,
    ]


def mean_nll(model: Path) -> float:
    """Mean over the response tokens (answer and end token) of the eight rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for i in range(1, 9):
        ids = [*tokenizer(f"{i} + 1 = {i + 1}").input_ids, tokenizer.eos_token_id]
        log_p = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_p[t - 1, ids[t]].item() for t in (4, 5)]
    return float(np.mean(losses))


@pytest.mark.parametrize(
    "lora", [[], ["model.lora_rank=16", "model.lora.merge=True"]], ids=["all", "LoRA"]
)
def test_it_learns_the_rows(lora: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """In a folder that another run has used, and whose files it moves aside."""
    overrides = settings(tiny_model, tmp_path, "trainer.total_training_steps=30", *lora)
    for name in ("metrics.jsonl", "huggingface/model.safetensors", "wandb_run_id"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("earlier")
    main_sft.run(load_config(overrides, "sft_trainer"))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    # The first loss is that of the model it started from: nothing but the response counts.
    assert lines[0]["train/loss"] == pytest.approx(mean_nll(tiny_model), rel=1e-4)
    final = mean_nll(tmp_path / "run/huggingface")
    assert final < 0.5 and final < lines[0]["train/loss"] / 4
    assert math.isclose(lines[-1]["actor/lr"], 0, abs_tol=1e-4)  # cosine schedule
    assert not ray.is_initialized()
    (moved,) = (tmp_path / "run").glob("earlier_run_*")
    for name in ("metrics.jsonl", "huggingface/model.safetensors", "wandb_run_id"):
        assert (moved / name).read_text() == "earlier"


def test_rows_that_are_too_long_are_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_sft.run(
            load_config(settings(tiny_model, tmp_path, "data.max_length=4"), "sft_trainer")
        )
    assert stopped.value.code == 2
    assert "data.max_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=/nowhere", "error: model.path=/nowhere: no Hugging Face model there"),
        ("model.external_lib=nowhere", "error: model.external_lib=nowhere: No module"),
        ("model.target_modules=[lm_head]", "error: model.target_modules=['lm_head']: lm_head"),
    ],
)
def test_messages_name_the_keys_of_the_warm_up(
    override: str, message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = settings(tiny_model, tmp_path, "model.lora_rank=4", override)
    with pytest.raises(SystemExit):
        main_sft.run(load_config(overrides, "sft_trainer"))
    said = capsys.readouterr().err
    assert said.startswith(message) and "actor_rollout_ref" not in said and "MODEL_" not in said
