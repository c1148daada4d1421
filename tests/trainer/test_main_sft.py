"""The supervised warm-up end to end: real Ray, FSDP2 on two ranks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import free_address, make_tokenizer, starting_warm
from tests.trainer.test_workers import FSDP, MODEL, OPTIM, given, overrides
from verl.config.load import load_config
from verl.models.policy import PolicyWorker
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


@pytest.mark.series(1)
@pytest.mark.parametrize(
    "lora", [[], ["model.lora_rank=16", "model.lora.merge=True"]], ids=["all", "LoRA"]
)
def test_it_learns_the_rows(lora: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """In a folder that another run has used, and whose files it moves aside."""
    overrides = settings(tiny_model, tmp_path, "trainer.total_training_steps=30", *lora)
    for name in ("metrics.jsonl", "huggingface/model.safetensors", "wandb_run_id"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("earlier")
    with starting_warm():
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


class InProcess:
    """In place of a worker group: one rank in this process. Notes all calls."""

    def __init__(self, *_: Any) -> None:
        self.worker, self.calls = PolicyWorker("cpu"), list[tuple[Any, ...]]()

    def connect(self) -> None:
        self.worker.connect(0, 1, free_address())

    def call(self, method: str, *args: Any) -> list[Any]:
        self.calls.append((method, *args))
        return [getattr(self.worker, method)(*args)]

    def scatter(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return self.call(method, *arguments[0])


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    """That of the next warm-up, which needs no Ray."""
    group = InProcess()
    monkeypatch.setattr("verl.cluster.start_ray", lambda *_, **__: None)
    monkeypatch.setattr("verl.cluster.reserve_devices", lambda *_: [])
    monkeypatch.setattr("verl.cluster.WorkerGroup", lambda *_: group)
    yield group
    if dist.is_initialized():
        dist.destroy_process_group()


ONE = "trainer.n_gpus_per_node=1", "trainer.device=cpu"


@pytest.mark.parametrize("sizes", [["2"], ["null", "data.max_token_len_per_gpu=9"]])
def test_batches_and_passes_are_as_the_keys_say(
    sizes: list[str], group: InProcess, tiny_model: Path, tmp_path: Path
) -> None:
    """Three rows a step in the order of the seed, for two epochs; the model's type is its own."""
    keys = ["data.train_batch_size=3", "data.seed=5", "data.max_length=9", "grad_clip=0.25"]
    keys += ["trainer.total_epochs=2", "trainer.hf_model_dtype=float16", "data.truncation=right"]
    keys += [f"data.micro_batch_size_per_gpu={sizes[0]}", *sizes[1:]]
    given = settings(tiny_model, tmp_path, *keys, *ONE, "data.prompt_key=q", "data.response_key=a")
    rows = [{"q": f"{i} + 1 =", "a": f"{i + 1}", "prompt": "x", "response": "y"} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    main_sft.run(load_config(given, "sft_trainer"))
    updates = [args for method, *args in group.calls if method == "update"]
    orders = [[s.prompt.index for s in steps[0].samples] for steps, *_ in updates]
    epochs = [np.random.default_rng([5, epoch]).permutation(8)[:6].tolist() for epoch in (0, 1)]
    expected = [epoch[i : i + 3] for epoch in epochs for i in (0, 3)]
    assert [sorted(order) for order in orders] == [sorted(order) for order in expected]
    _, loss, limit, clip = updates[0]
    assert (loss.kind, clip) == ("nll", 0.25)
    by_tokens = limit.size, limit.max_tokens
    assert by_tokens == ((None, 9) if len(sizes) > 1 else (2, 16384))
    decoded = make_tokenizer().decode(updates[0][0][0].samples[0].response_ids[:-1])
    assert decoded == str(updates[0][0][0].samples[0].prompt.index + 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/huggingface", dtype="auto")
    assert model.dtype == torch.float16


def test_rows_come_in_the_order_of_the_file_on_request(
    group: InProcess, tiny_model: Path, tmp_path: Path
) -> None:
    keys = ["data.shuffle=False", "data.train_batch_size=4", "trainer.total_epochs=1"]
    main_sft.run(load_config(settings(tiny_model, tmp_path, *keys, *ONE), "sft_trainer"))
    seen = [{s.prompt.index for s in a[1][0].samples} for a in group.calls if a[0] == "update"]
    assert seen == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_the_warm_up_ends_after_as_many_skipped_steps_as_the_key_says(
    group: InProcess, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step throws the weights out of the range of numbers."""
    keys = ["optim.lr=1e30", "optim.warmup_style=constant", "trainer.max_skipped_steps=2"]
    given = settings(tiny_model, tmp_path, *keys, *ONE, "trainer.total_training_steps=9")
    with pytest.raises(SystemExit):
        main_sft.run(load_config(given, "sft_trainer"))
    assert (
        "of 2 optimizer steps of the model in a row was not finite (trainer.max_skipped_steps=2)"
        in (capsys.readouterr().err)
    )
    assert [a[0] for a in group.calls].count("update") == 3


def test_the_model_is_built_as_its_sections_say(
    group: InProcess, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(method: str, *args: Any) -> list[Any]:
        raise LookupError(method, *args)

    monkeypatch.setattr(group, "call", call)
    weights = f"model.path={tiny_model}", f"model.tokenizer_path={tiny_model}"
    model = {key: value for key, value in MODEL.items() if key not in ("path", "tokenizer_path")}
    model |= {"override_config": {"rope_theta": 5}, "external_lib": "json"}
    keys = [*overrides("model", model), *overrides("fsdp_config", FSDP), *overrides("optim", OPTIM)]
    config = load_config(settings(tiny_model, tmp_path, *keys, *weights, *ONE), "sft_trainer")
    with pytest.raises(LookupError) as built:
        main_sft.train(config, make_tokenizer(), main_sft.StopSignals())
    method, *found, steps = built.value.args
    paths = dict.fromkeys(("path", "tokenizer_path"), str(tiny_model))
    assert method == "build" and steps == 1
    assert given(found[0], model | paths)
    assert given(found[1], FSDP) and given(found[2], OPTIM)


def test_the_cluster_is_asked_for_what_the_keys_say(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Ray itself here; a machine that has nothing says what was asked for."""
    asked: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    keys = ["trainer.nnodes=2", "trainer.n_gpus_per_node=50", "trainer.device=cuda"]
    keys += ["ray_init.num_cpus=7", "+ray_init.runtime_env.env_vars.A=b"]
    config = load_config(settings(tiny_model, tmp_path, *keys), "sft_trainer")
    with pytest.raises(ValueError, match=r"needs 2 machine.* with 100 CPU, 50 GPU each; .* has 0"):
        main_sft.train(config, make_tokenizer(), main_sft.StopSignals())
    (options,) = asked
    assert (options["num_cpus"], options["runtime_env"]) == (7, {"env_vars": {"A": "b"}})
