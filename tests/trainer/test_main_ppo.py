"""The main job end to end, as users start it: real Ray, FSDP2 on two ranks, two engines."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.helpers import made_once, starting_warm, warm_python
from verl.cluster import WorkerGroup
from verl.config.load import load_config
from verl.trainer import main_export, main_ppo
from verl.trainer.ppo.checkpoint import MANIFEST, seal
from verl.trainer.ppo.workers import NOT_RESUMED

another_run = pytest.mark.series(2, "runs beside the finished one")
REWARD = """
def share_of_pluses(data_source, solution_str, ground_truth, extra_info=None):
    share = solution_str.count("+") / max(1, len(solution_str))
    return {"score": share, "acc": share > 0.5, "pred": solution_str[:1]}
"""


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of a few seconds a step."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "data_source": "pluses",
            "prompt": " ".join(str((i * j) % 100) for j in range(1, 3 + i % 4)),
            "reward_model": {"style": "rule", "ground_truth": "+"},
            "extra_info": {"index": i},
        }
        for i in range(1, 41)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:32]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[32:]), folder / "test.parquet")
    (folder / "reward.py").write_text(REWARD)
    return [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        f"custom_reward_function.path={folder}/reward.py",
        "custom_reward_function.name=share_of_pluses",
        "data.apply_chat_template=False",
        "data.train_batch_size=16",
        "data.max_prompt_length=16",
        "data.max_response_length=24",
        f"actor_rollout_ref.model.path={tiny_model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        "algorithm.use_grpopp=True",
        "trainer.logger=console",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=4",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
    ]


def command(settings: list[str], *overrides: str) -> list[str]:
    return [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]


def run(settings: list[str], *overrides: str) -> None:
    """The main job in this process, which has its modules already, as have Ray's workers: each
    would take 4 s to import them."""
    with starting_warm():
        main_ppo.run(load_config([*settings, *overrides]))


def run_alone(settings: list[str], *overrides: str) -> None:
    """The main job as users start it."""
    done = subprocess.run(command(settings, *overrides), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run, without what the clock and the machine say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("timing", "perf/"))} for line in lines
    ]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    return made_once(
        tmp_path_factory.getbasetemp(),
        "finished",
        lambda folder: run_alone(
            settings,
            f"trainer.default_local_dir={folder}",
            "trainer.logger=[console,tensorboard]",
            "trainer.log_val_generations=3",
        ),
    )


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`python -m verl.trainer.main_export` in this process."""

    def run_with(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["main_export", *map(str, arguments)])
        main_export.main()

    return run_with


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_any_checkpoint_becomes_a_hugging_face_folder(
    finished: Path, tmp_path: Path, export: Callable[..., None]
) -> None:
    """Of the run's folder it is the latest, which is the model that training ended with."""
    run_folder = tmp_path / "run"  # may have been moved since
    shutil.copytree(finished, run_folder)
    shutil.rmtree(run_folder / "huggingface")
    alone = [warm_python(), "-m", "verl.trainer.main_export", str(run_folder)]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"the model of global_step_4 is in {run_folder}/huggingface" in done.stdout
    expected, found = weights_of(finished / "huggingface"), weights_of(run_folder / "huggingface")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    export(run_folder / "global_step_2", "-o", tmp_path / "two")
    two = weights_of(tmp_path / "two")
    assert any(not torch.equal(two[name], expected[name]) for name in two)
    files = {path.name for path in (finished / "huggingface").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == files


def test_what_cannot_be_exported_is_one_line(
    finished: Path,
    tmp_path: Path,
    export: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished / "global_step_2", tmp_path / "global_step_2")
    (tmp_path / "global_step_2" / "trainer.json").unlink()
    # Since it was written, its model has got another layer, which it has no weights for.
    other = tmp_path / "other" / "global_step_2"
    shutil.copytree(finished / "global_step_2", other)
    state = json.loads((other / "trainer.json").read_text())
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    state["config"]["actor_rollout_ref"]["model"]["override_config"] = layers
    (other / "trainer.json").write_text(json.dumps(state))
    (other / MANIFEST).unlink()
    seal(other)
    for path, text in (
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "global_step_2", "trainer.json is missing"),
        (tmp_path / "global_step_3", "is no whole checkpoint"),
        (other, "model.layers.2."),
    ):
        with pytest.raises(SystemExit) as stopped:
            export(path)
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.out == ""
        assert printed.err.splitlines()[-1].startswith("error: ") and text in printed.err


def test_the_policy_learns_and_reports(finished: Path) -> None:
    steps = read(finished)
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert steps[4]["critic/score/mean"] > 3 * steps[1]["critic/score/mean"]
    assert {"val-core/pluses/acc/mean@2", "val-core/pluses/acc/best@2/mean"} <= steps[2].keys()
    assert not any(key.startswith("val-core") for key in steps[3])
    for key in (
        "actor/pg_loss",
        "actor/kl_loss",
        "actor/entropy",
        "actor/grad_norm",
        "actor/lr",
        "loss_agg/cv",
        "loss_agg/effective_batch",
        "response_length/mean",
        "response_length/clip_ratio",
    ):
        assert isinstance(steps[1][key], float), key
    assert steps[1]["actor/grad_norm"] > 0
    assert steps[1]["actor/kl_loss"] < steps[4]["actor/kl_loss"]


SPREAD = ("mean", "max", "min")
PHASES = ("ref", "old_log_prob", "adv", "update_actor")
METRICS = {
    "actor": (
        "pg_loss",
        "entropy",
        "ppo_kl",
        "pg_clipfrac",
        "pg_clipfrac_lower",
        "grad_norm",
        "lr",
        "kl_loss",
        "skipped_steps",
    ),
    **{f"critic/{name}": SPREAD for name in ("score", "rewards", "advantages", "returns")},
    "response_length": (*SPREAD, "clip_ratio", "cv"),
    "response_length_non_aborted": (*SPREAD, "clip_ratio"),
    "response": ("aborted_ratio",),
    "num_turns": SPREAD,
    "prompt_length": (*SPREAD, "clip_ratio"),
    "timing_s": ("gen", "reward", *PHASES, "update_weights", "step"),
    "timing_per_token_ms": ("gen", *PHASES),
    "perf": (
        "total_num_tokens",
        "time_per_step",
        "throughput",
        "max_memory_gb",
        "cpu_memory_used_gb",
    ),
    "train": ("num_gen_batches",),
    "training": ("global_step", "epoch"),
    "reward": ("acc",),
    "rollout": ("logprob_diff_mean", "logprob_diff_max", "kl", "policy_age_mean", "policy_age_max"),
    "rollout_corr": (
        "kl",
        "k3_kl",
        "training_ppl",
        "training_log_ppl",
        "rollout_ppl",
        "rollout_log_ppl",
        "log_ppl_diff",
        "log_ppl_abs_diff",
        "log_ppl_diff_max",
        "log_ppl_diff_min",
        "ppl_ratio",
        "chi2_token",
        "chi2_seq",
    ),
    "loss_agg": (
        "cv",
        "effective_batch",
        "cv/token-mean",
        "cv/seq-mean-token-mean",
        "cv/seq-mean-token-sum",
        "cv/dr-grpo",
    ),
}
"""What a training step reports, as docs/metrics.md says."""
VALIDATION = {
    "val-core/pluses/acc": ("mean@2", "best@2/mean", "best@2/std", "maj@2/mean"),
    "val-core": ("best_acc", "best_step"),
    "val-aux/pluses": (
        "acc/std@2",
        "reward/mean@2",
        "response_length/mean",
        "response_length/clip_ratio",
    ),
}


def test_every_metric_has_verls_name_and_a_value_that_can_be(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    names, validation = (
        {f"{section}/{name}" for section, names in table.items() for name in names}
        for table in (METRICS, VALIDATION)
    )
    first, trained, both = lines[0], lines[1], lines[2]
    assert first.keys() - {"step"} == validation
    assert trained.keys() - {"step"} == names
    assert both.keys() - {"step", "timing_s/testing"} == names | validation
    assert None not in both.values()
    for section in [name for name in METRICS if SPREAD[0] in METRICS[name]]:
        least, mean, most = (both[f"{section}/{name}"] for name in ("min", "mean", "max"))
        assert least <= mean + 1e-9 and mean <= most + 1e-9, section
    assert both["critic/advantages/mean"] == pytest.approx(0, abs=1e-6)
    assert 0 < both["actor/entropy"] < 5 and both["actor/lr"] == 3e-3
    tokens, seconds = both["perf/total_num_tokens"], both["timing_s/step"]
    assert tokens == 16 * 8 * (both["prompt_length/mean"] + both["response_length/mean"])
    assert both["perf/throughput"] == pytest.approx(tokens / seconds / 2)  # ranks
    assert both["timing_per_token_ms/ref"] == pytest.approx(1e3 * both["timing_s/ref"] / tokens)
    assert seconds == pytest.approx(
        sum(both[f"timing_s/{name}"] for name in METRICS["timing_s"][:-1])
    )
    assert 0.1 < both["perf/max_memory_gb"] < 10
    assert both["val-core/pluses/acc/mean@2"] <= both["val-core/pluses/acc/best@2/mean"]


def test_tensorboard_shows_what_the_file_holds(finished: Path) -> None:
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    tags = board.Tags()
    assert tags["tensors"] == ["val/generations/text_summary"]
    texts = board.Tensors("val/generations/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert [str(event.tensor_proto).count("score ") for event in texts] == [3, 3, 3]
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {*tags["scalars"]} == {key for line in steps for key in line} - {"step"}
    for key in ("critic/score/mean", "val-core/pluses/acc/mean@2"):
        shown = [(event.step, event.value) for event in board.Scalars(key)]
        assert shown == [(s["step"], pytest.approx(s[key])) for s in steps if key in s]


def test_the_final_model_is_the_trained_one(finished: Path, tiny_model: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(finished / "huggingface")
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(trained.parameters(), start.parameters(), strict=True)
    ]
    assert min(moved) > 0
    assert trained.lm_head.weight is trained.model.embed_tokens.weight


@another_run
def test_one_rank_resumes_what_two_saved_and_all_terms_run(
    settings: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    export: Callable[..., None],
) -> None:
    """What it saves are Hugging Face folders alone, from which the next one goes on."""
    submit, calls = WorkerGroup.submit, []

    def submit_and_note(group: WorkerGroup, method: str, *args: Any, **options: Any) -> Any:
        calls.append(method)
        return submit(group, method, *args, **options)

    monkeypatch.setattr(WorkerGroup, "submit", submit_and_note)
    own = [
        f"trainer.default_local_dir={tmp_path}",
        "trainer.n_gpus_per_node=1",
        "trainer.save_freq=1",
        "trainer.save_hf_model=False",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
    ]
    run(
        settings,
        *own,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={finished}/global_step_2",
        "actor_rollout_ref.actor.checkpoint.load_contents=[model,optimizer,hf_model]",
    )
    assert not [name for name in NOT_RESUMED.values() if name in caplog.text]
    # Engines give their memory back before the actor builds and loads, which needs it.
    order = [calls.index(name) for name in ("sleep", "build", "load", "start_update")]
    assert order == sorted(order)
    # As they do while whole weights are gathered; before they generate again, they get new ones.
    (first, last) = (i for i, name in enumerate(calls) if name == "save")
    assert calls[first - 1] == calls[last - 1] == "sleep"
    assert calls[first:last].count("start_update") == 2  # one of them after step 4
    assert "start_update" not in calls[last:]
    for step in (3, 4):
        assert weights_of(tmp_path / f"global_step_{step}" / "actor" / "huggingface")
    export(tmp_path / "global_step_4", "-o", tmp_path / "exported")
    kept = weights_of(tmp_path / "global_step_4" / "actor" / "huggingface")
    exported = weights_of(tmp_path / "exported")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    run(settings, *own, "trainer.total_training_steps=5", "trainer.test_freq=-1")
    assert all(caplog.text.count(text) == 1 for text in NOT_RESUMED.values())
    line, _, last_line = read(tmp_path)
    assert last_line["training/global_step"] == 5 and last_line["actor/grad_norm"] > 0
    expected = read(finished)[3]
    for key in ("critic/score/mean", "response_length/mean"):
        assert line[key] == expected[key]
    assert line["actor/grad_norm"] == pytest.approx(expected["actor/grad_norm"], rel=1e-4)
    assert not (tmp_path / "huggingface").exists()


@another_run
def test_a_checkpoint_can_be_validated(
    settings: list[str],
    finished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the run's own folder, whose files stay as they are, and without training data."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for step in (2, 4):
        path = f"trainer.resume_from_path={folder}/global_step_{step}"
        run(
            settings,
            f"trainer.default_local_dir={folder}",
            *(["trainer.resume_mode=resume_path", path] if step == 2 else []),
            "data.train_files=/nowhere.parquet",
            "trainer.val_only=True",
            "trainer.n_gpus_per_node=1",
        )
        (line,) = read(folder / "val_only")
        validated = {k: v for k, v in read(finished)[step].items() if k.startswith("val-")}
        best = {"val-core/best_acc", "val-core/best_step"}
        assert validated and {k: line[k] for k in validated if k not in best} == {
            k: v for k, v in validated.items() if k not in best
        }
        assert f"validation at step {step}" in capfd.readouterr().out
        assert {path: path.read_bytes() for path in before} == before
    moved = f"what another run left was moved to {folder}/val_only/earlier_run_"
    assert caplog.text.count(moved) == 1


@another_run
def test_a_new_run_in_a_used_folder(
    settings: list[str], finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It moves nothing before its workers have started, and then everything."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "error.log").write_text("an earlier error\n")
    before = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    before = {name: path.read_bytes() for name, path in before.items() if name != ".lock"}
    overrides = [
        f"trainer.default_local_dir={folder}",
        "trainer.resume_mode=disable",
        "trainer.total_training_steps=2",
        "trainer.max_actor_ckpt_to_keep=1",
        "trainer.n_gpus_per_node=1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
    ]
    engine = "actor_rollout_ref.rollout.name=hf"
    with pytest.raises(SystemExit) as stopped:
        run(settings, *overrides, engine, "trainer.nnodes=9")
    assert stopped.value.code == 2
    assert not list(folder.glob("earlier_run_*"))
    run(settings, *overrides)
    (moved,) = folder.glob("earlier_run_*")
    after = {str(path.relative_to(moved)): path for path in moved.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in after.items()} == before
    assert caplog.text.count(f"what another run left was moved to {moved}\n") == 1
    assert [line["step"] for line in read(folder)] == [1, 2]
    assert not (folder / "error.log").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_files=/nowhere/train.parquet", "/nowhere/train.parquet"),
        ("actor_rollout_ref.model.path=/nowhere/model", "actor_rollout_ref.model.path=/nowhere"),
        ("data.train_batch_size=64", "data.train_batch_size=64 is more than the 32"),
        ("custom_reward_function.name=missing", "missing"),
    ],
)
def test_input_that_cannot_be_used_is_named_before_anything_starts(
    settings: list[str], override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(settings, override)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not ray.is_initialized()


@pytest.mark.parametrize("times", [0, 2])
def test_a_run_whose_workers_die_starts_again_as_often_as_the_key_says(
    times: int,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts = []

    def init(**options: Any) -> None:
        starts.append(options)
        raise ray.exceptions.RayActorError(None, "The actor died")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    folder = f"trainer.default_local_dir={tmp_path}"
    with pytest.raises(SystemExit) as stopped:
        run(settings, folder, f"trainer.max_restarts={times}")
    assert stopped.value.code == 1 and len(starts) == 1 + times
    assert "no step was saved: the same command starts anew" in capsys.readouterr().err


def test_an_error_leaves_the_traceback_of_the_one_before(tmp_path: Path) -> None:
    for text in ("the first", "the second"):
        details = f" (details: {tmp_path}/error.log)"
        assert main_ppo._error(ValueError(text), tmp_path) == f"error: {text}{details}"
    assert (tmp_path / "error.log").read_text() == "ValueError: the first\nValueError: the second\n"


def test_an_engine_that_is_not_installed_is_named(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("verl.rollout.engine.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(settings, "actor_rollout_ref.rollout.name=vllm")
    assert stopped.value.code == 2
    message = "rollout.name=vllm, but vllm is not installed: run bash setup.sh gpu (or cpu --vllm)"
    assert message in capsys.readouterr().err


OWN = """
def weights(lengths): return 1 / (len(lengths) * lengths)
def advantages(rewards, groups): return rewards - rewards.mean()
def loss(inputs): return -inputs.advantages * inputs.log_probs, {"seen": inputs.log_probs * 0 + 7}
"""


@another_run
def test_functions_of_the_users_run_and_are_kept(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss in a process of its own. With another text the run doesn't go on."""
    code, folder = tmp_path / "own.py", tmp_path / "run"
    code.write_text(OWN)
    own = [
        f"actor_rollout_ref.actor.loss_agg_mode={code}:weights",
        f"algorithm.adv_estimator={code}:advantages",
        f"actor_rollout_ref.actor.policy_loss.loss_mode={code}:loss",
        f"trainer.default_local_dir={folder}",
        "algorithm.use_grpopp=False",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_hf_model=False",
    ]
    run(settings, *own)
    (step,) = read(folder)
    assert step["actor/seen"] == 7
    assert step["loss_agg/cv"] == pytest.approx(step["loss_agg/cv/seq-mean-token-mean"])
    kept = {path.name: path.read_text() for path in (folder / "own_functions").iterdir()}
    assert kept == dict.fromkeys(("loss_agg_mode.py", "adv_estimator.py", "loss_mode.py"), OWN)
    code.write_text(OWN + "# edited\n")
    with pytest.raises(SystemExit):
        run(settings, *own, "trainer.total_training_steps=2")
    message = capsys.readouterr().err
    assert "belongs to another training:\n  algorithm.own_functions: " in message
    assert message.count("own.py:loss@") == 2
