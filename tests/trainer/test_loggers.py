"""Loggers beside wandb and TensorBoard: each test needs the package, and none an account."""

import json
import sqlite3
from pathlib import Path

import pytest

from verl.config import base
from verl.config.load import load_config
from verl.config.schema import SHOW_GENERATIONS, Config, TrainerConfig
from verl.trainer import main_ppo, main_sft
from verl.trainer.ppo.loggers import LOGGERS, Run, check_packages

METRICS = {"actor/entropy": 1.5, "val-core/openai/gsm8k/acc/mean@4": 0.25}
GENERATIONS = [("1 + 1 =", "<b>2</b>", 1.0), ("1 + 2 =", "4", 0.0)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these packages keep what they write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def show(name: str, steps: range, failed: bool = False) -> None:
    """As a run does that begins at the first of `steps`."""
    config = Config(trainer=TrainerConfig(project_name="p", experiment_name="e"))
    logger = LOGGERS[name](Run(config, Path("run"), "abc12345", steps[0], Path("board")))
    for step in steps:
        logger.log({"val-core/x/acc/mean@1": step / 10}, step, None)
        logger.log_generations(GENERATIONS, step)
        logger.log(METRICS | {"critic/score/mean": step}, step, METRICS)
    logger.close(failed)


def test_every_name_has_a_logger():
    assert {*base.LOGGERS} == {"console", "file", *LOGGERS}
    assert {*SHOW_GENERATIONS} == {*LOGGERS} - {"vemlp_wandb"}


def test_a_package_that_is_missing_is_named():
    check_packages(["console", "wandb", "tensorboard", "file"])
    with pytest.raises(ValueError, match=r"^trainer\.logger=vemlp_wandb needs .*pip install volc"):
        check_packages("vemlp_wandb")


@pytest.mark.parametrize(
    ("run", "config"), [(main_ppo.run, "ppo_trainer"), (main_sft.run, "sft_trainer")]
)
def test_it_is_named_before_anything_starts(run, config, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(load_config(["trainer.logger=[console,vemlp_wandb]"], config))
    assert stopped.value.code == 2
    assert "error: trainer.logger=vemlp_wandb needs the package" in capsys.readouterr().err


def test_mlflow_continues_its_run():
    mlflow = pytest.importorskip("mlflow")
    show("mlflow", range(3), failed=True)
    show("mlflow", range(2, 5))
    (run,) = mlflow.search_runs(experiment_names=["p"], output_format="list")
    assert (run.info.run_name, run.info.status) == ("e", "FINISHED")
    assert run.data.metrics["val-core/openai/gsm8k/acc/mean_at_4"] == 0.25
    assert run.data.params["actor_rollout_ref.rollout.name"] == "hf"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "critic/score/mean")
    assert [(m.step, m.value) for m in history] == [(i, float(i)) for i in (0, 1, 2, 2, 3, 4)]
    table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/val/generations/4.json")
    assert table["data"] == [list(generation) for generation in GENERATIONS]


def test_swanlab_is_offline_without_a_key(tmp_path):
    pytest.importorskip("swanlab")
    show("swanlab", range(2))
    (folder,) = (tmp_path / "run" / "swanlab").glob("run-*")
    assert any(b"val-core/openai/gsm8k" in f.read_bytes() for f in folder.glob("*.swanlab"))
    assert any("<b>2</b>" in f.read_text() for f in folder.glob("media/text/**/*.txt"))
    assert "experiment_name" in (folder / "files" / "config.yaml").read_text()


def test_trackio_continues_its_run(tmp_path):
    pytest.importorskip("trackio")
    show("trackio", range(2))
    show("trackio", range(2, 4))
    (path,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(path).execute("select run_name, step, metrics from metrics").fetchall()
    seen = [(run, step, json.loads(found)) for run, step, found in rows]
    scores = [(run, step, m["critic/score/mean"]) for run, step, m in seen if len(m) == 3]
    assert scores == [("e", step, float(step)) for step in range(4)]


def test_clearml_without_a_server(tmp_path, monkeypatch):
    """And without a fork of this process."""
    clearml = pytest.importorskip("clearml")
    monkeypatch.delattr("os.fork")
    clearml.Task.set_offline(True)
    show("clearml", range(2))
    (path,) = tmp_path.rglob("metrics.jsonl")
    text = path.read_text()
    assert all(word in text for word in ("entropy", "openai/gsm8k/acc/mean@4", "generations"))


VEMLP = """
import json
def write(*args, **kwargs):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps([args, kwargs], default=str) + "\\n")
init = log = finish = write
"""


def test_vemlp_wandb_gets_the_account_and_the_metrics(tmp_path, monkeypatch):
    """The package is not public: this one writes down what it is asked for."""
    package = tmp_path / "volcengine_ml_platform"
    package.mkdir()
    for file in ("__init__.py", "wandb.py"):
        (package / file).write_text(VEMLP)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"ak": "VOLC_ACCESS_KEY_ID", "sk": "VOLC_SECRET_ACCESS_KEY"}
    for name in (*names.values(), "MLP_TRACKING_REGION"):
        monkeypatch.setenv(name, name.lower())
    check_packages("vemlp_wandb")
    show("vemlp_wandb", range(3, 4), failed=True)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    account, started, validation, step, end = calls
    assert account[1] == {k: v.lower() for k, v in names.items()} | {
        "region": "mlp_tracking_region"
    }
    assert (started[1]["project"], started[1]["name"]) == ("p", "e")
    assert validation == [[{"val-core/x/acc/mean@1": 0.3}], {"step": 3}]
    assert step == [[METRICS | {"critic/score/mean": 3}], {"step": 3}]
    assert end == [[], {"exit_code": 1}]
