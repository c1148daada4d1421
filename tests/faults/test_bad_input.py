"""Input that can't be used: one line that names what is wrong, and no step is lost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file, save_file

from tests.faults.jobs import job, lines
from tests.helpers import long_test, make_tiny_model, starting_warm
from verl.config.load import load_config
from verl.trainer import main_ppo
from verl.trainer.ppo.checkpoint import LATEST

ROW: dict[str, Any] = {
    "data_source": "countdown",
    "prompt": "1 2",
    "reward_model": {"style": "rule", "ground_truth": {"target": 3, "numbers": [1, 2]}},
    "extra_info": {"index": 0},
}


def refused(
    rows: list[dict[str, Any]],
    model: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *overrides: str,
) -> str:
    """What a run on these rows says when it ends with status 2."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    settings = [
        f"data.train_files={folder}/train.parquet",
        "data.val_files=null",
        "trainer.val_before_train=False",
        "data.apply_chat_template=False",
        "data.train_batch_size=4",
        "data.max_prompt_length=8",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.n=2",
        f"trainer.default_local_dir={folder}/run",
    ]
    with pytest.raises(SystemExit) as stopped:
        main_ppo.run(load_config([*settings, *overrides]))
    assert stopped.value.code == 2
    assert not ray.is_initialized()
    error = capsys.readouterr().err
    return error[error.index("error: ") :]


def truth(value: Any) -> dict[str, Any]:
    return ROW | {"reward_model": {"style": "rule", "ground_truth": value}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, *[ROW | {"prompt": ""}] * 4], "train.parquet, row 1, key 'prompt': the text is emp"),
        ([ROW, *[ROW | {"prompt": None}] * 4], "train.parquet, row 1, key 'prompt': must be a str"),
        ([ROW] * 4 + [ROW | {"prompt": "1 " * 9}], "row 4, key 'prompt': the prompt has 9 tokens"),
        ([{"prompt": "1"}] * 4, "train.parquet, key 'data_source': no such column, only prompt"),
        ([truth("three")] * 4, "row 0, key 'reward_model': the ground truth of countdown must be"),
        (
            [ROW] * 3 + [truth({"target": 3, "numbers": None})],
            "row 3, key 'reward_model': the ground truth of countdown must be",
        ),
        ([ROW | {"data_source": "mine"}] * 4, "no reward function for data_source='mine'"),
        ([ROW] * 3, "data.train_batch_size=4 is more than the 3 training prompts"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    rows: list[dict[str, Any]],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(rows, tiny_model, tmp_path, capsys)
    assert message in error and error.count("\n") == 1


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_a_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_few_embeddings(folder: Path) -> None:
    make_tiny_model(folder, vocab_size=4)


def with_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_tokenizer, "no tokenizer there: name another in data.tokenizer"),
        (without_a_norm, "1 weights of the model are missing, such as model.layers.1.input_layer"),
        (with_a_pointer, "model.safetensors is a pointer of git-lfs"),
        (with_few_embeddings, "train.parquet, row 0, key 'prompt': the tokenizer gives token 5"),
    ],
)
def test_models_that_cannot_be_used_are_named(
    change: Callable[[Path], None],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    change(model)
    error = refused([ROW] * 4, model, tmp_path, capsys)
    assert message in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = f"trainer.default_local_dir={tmp_path}/file"
    error = refused([ROW] * 4, tiny_model, tmp_path, capsys, folder)
    assert f"{folder} can't be written" in error and error.count("\n") == 1


@long_test
def test_a_key_that_vllm_does_not_know_is_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.block_sizes=16",
        "trainer.n_gpus_per_node=1",
    )
    with starting_warm():
        error = refused([ROW] * 4, tiny_model, tmp_path, capsys, *overrides)
    if "not installed" in error:
        pytest.skip("needs vLLM")
    assert "engine_kwargs.vllm, arguments of vLLM: there is no key 'block_sizes'" in error
    assert "the nearest one is 'block_size'" in error and error.count("\n") == 1


@pytest.fixture
def own_reward(settings: list[str], tmp_path: Path) -> tuple[list[str], Path]:
    """The settings with a copy of the reward function, to be changed."""
    given = next(s for s in settings if s.startswith("custom_reward_function.path="))
    path = tmp_path / "reward.py"
    path.write_text(Path(given.partition("=")[2]).read_text())
    others = [s for s in settings if s != given]
    return [*others, f"custom_reward_function.path={path}"], path


@long_test
def test_a_reward_function_that_hangs_costs_no_step(
    own_reward: tuple[list[str], Path], tmp_path: Path
) -> None:
    """In mid-run: the run ends all the same, with a checkpoint of the last whole step."""
    settings, path = own_reward
    folder, flag, code = tmp_path / "run", tmp_path / "training", path.read_text()
    code = code.replace("    share =", "    if FLAG.exists(): time.sleep(3600)\n    share =", 1)
    path.write_text(f"import time\nfrom pathlib import Path\nFLAG = Path({str(flag)!r})\n{code}")
    overrides = ("trainer.save_freq=4", "trainer.n_gpus_per_node=1")
    with job(settings, folder, *overrides, "custom_reward_function.timeout_s=2") as hung:
        hung.until_step(1)
        flag.touch()
        log = hung.end(1)
    assert "no answer after 2 s" in log and ".parquet, row " in log and "Traceback" not in log
    assert int((folder / LATEST).read_text()) == lines(folder)[-1]["step"] >= 1
