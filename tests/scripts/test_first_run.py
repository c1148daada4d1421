"""train_scripts/first_run.sh: what its checks find, and how it goes on and stops."""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import starting_warm
from tests.scripts.test_scripts import dry_run, resolved
from verl.config.load import load_config
from verl.tools import first_run
from verl.tools.first_run import Passed, climb, read_passed, run_job, table
from verl.tools.rung_checks import (
    Findings,
    judge_metrics,
    judge_preflight,
    judge_resumed,
    memory_estimate,
)
from verl.tools.rungs import TABLE, FirstRun, Rung

TOLERANCE = "actor_rollout_ref.rollout.verify_weights_tolerance=0.02"


def step(number: int, **changes: Any) -> dict[str, Any]:
    """Metrics of a step that is as it should be, with changes to some: `actor__grad_norm=0`."""
    record: dict[str, Any] = {
        "step": number,
        "actor/pg_loss": -0.01,
        "actor/grad_norm": 0.3,
        "actor/skipped_steps": 0.0,
        "rollout/logprob_diff_mean": 0.004,
        "rollout/verify_logprob_diff": 0.006,
        "perf/time_per_step": 20.0,
        "perf/total_num_tokens": 30000.0,
        "perf/max_memory_gb": 11.0,
        "perf/max_memory_allocated_gb": 11.0,
        "perf/max_memory_reserved_gb": 12.0,
        "perf/mfu": 0.3,
    }
    return record | {key.replace("__", "/"): value for key, value in changes.items()}


def judged(*records: dict[str, Any], last: int | None = 2, cpu: bool = False) -> Findings:
    """With an estimate of 10 GiB, so that 13 GiB are the limit, at full length."""
    verify = "actor_rollout_ref.rollout.verify_weights=True"
    config = load_config([verify, TOLERANCE, "data.max_response_length=8192"])
    return judge_metrics(records, config, last, cpu, 10.0)


def test_a_run_as_it_should_be_passes() -> None:
    found = judged(step(1), step(2, rollout__logprob_diff_mean=0.001))
    assert (found.problems, found.warnings) == ([], [])
    figures = dict(step_s=20.0, tokens_s=1500.0, mfu=0.3, difference=0.004, memory=11.0)
    assert found.figures == figures | {"estimate": 10.0}
    assert str(found) == (
        "20.0 s a step, 1,500 tokens/s, difference 4.0e-03, memory 11.0 of 10.0 GiB, MFU 30%"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rollout__verify_logprob_diff": 0.03}, "verify_logprob_diff is 0.03 (step 2), above 0.0"),
        ({"rollout__logprob_diff_mean": 0.06}, "logprob_diff_mean is 0.06 (step 2), above 0.05"),
        ({"rollout__logprob_diff_mean": None}, "rollout/logprob_diff_mean is not finite (step 2)"),
        ({"actor__pg_loss": None}, "actor/pg_loss is not finite (step 2)"),
        ({"actor__skipped_steps": 1.0}, "actor/skipped_steps is 1 (step 2), not 0"),
        (
            {"perf__max_memory_allocated_gb": 13.1},
            "perf/max_memory_allocated_gb is 13.1 GiB, the estimate 10.0 GiB",
        ),
        ({"step": 3}, "metrics.jsonl has the steps [1, 3], not those from 1 to 2"),
    ],
)
def test_what_is_wrong_with_a_step_is_named_with_its_numbers(
    changes: dict[str, Any], problem: str
) -> None:
    (found,) = judged(step(1), step(2, **changes)).problems
    assert problem in found


def test_what_was_not_compared_is_no_success() -> None:
    without = {key: value for key, value in step(2).items() if "verify" not in key}
    assert judged(step(1), without).problems == [
        "rollout/verify_logprob_diff is missing in step 2: nothing was compared"
    ]
    (found,) = judged(step(1, actor__grad_norm=0.0), step(2, actor__grad_norm=0.0)).problems
    assert "actor/grad_norm is 0 in all steps" in found
    assert judged(step(1, actor__grad_norm=0.0), step(2)).problems == []
    (found,) = judged(cpu=True).problems
    assert "has the steps []" in found
    assert judged(step(1), last=None).problems == [], "of a job that has failed"


def test_in_float32_the_limit_is_lower() -> None:
    assert judged(step(1), step(2), cpu=True).problems == [
        "rollout/logprob_diff_mean is 0.004 (step 1), above 0.001: engine and actor differ"
    ]


def test_slow_updates_and_memory_in_pieces_are_warnings() -> None:
    found = judged(step(1), step(2, perf__mfu=0.05, perf__max_memory_reserved_gb=14.0))
    assert found.problems == []
    assert ["reserved_gb is 14.0" in found.warnings[0], "0.050" in found.warnings[1]] == [True] * 2


def test_memory_is_compared_with_an_update_without_the_process(tmp_path: Path) -> None:
    """A decoder of one layer."""
    sizes = dict(hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, vocab_size=1024)
    content = dict(model_type="qwen2", num_attention_heads=8, tie_word_embeddings=True) | sizes
    (tmp_path / "config.json").write_text(json.dumps(content))
    settings = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "data.max_prompt_length=8"]
    settings += ["data.max_response_length=8", "trainer.n_gpus_per_node=1"]
    settings += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16"]
    config = load_config([*settings, f"actor_rollout_ref.model.path={tmp_path}"])
    # 1024 × 1024 embeddings, four matrices of attention and three of the MLP, each like them; 16
    # bytes a parameter with gradient and optimizer, and what an update gathers: far below the
    # 2 GiB that CUDA is assumed to take for a process.
    estimate = memory_estimate(config)
    assert estimate is not None and 16 * 8 * 2**20 < estimate * 2**30 < 32 * 8 * 2**20
    assert memory_estimate(load_config(["actor_rollout_ref.model.path=/nowhere"])) is None


def test_a_resumed_job_goes_on_after_the_steps_that_were_there() -> None:
    before = [step(1), step(2)]
    assert list(judge_resumed([], before)) == []
    assert list(judge_resumed(before, [*before, step(3)])) == []
    assert list(judge_resumed(before, before)) == ["the resumed job made no step after step 2"]
    again = [step(1), step(2, perf__time_per_step=21.0), step(3)]
    (found,) = judge_resumed(before, again)
    assert "steps 1 to 2 were made again" in found


def test_the_report_of_the_preflight_is_shown_with_its_remedies(tmp_path: Path) -> None:
    checks = [
        {"name": "driver", "status": "failure", "text": "525", "remedy": "install 580"},
        {"name": "disk", "status": "warning", "text": "1 GB", "remedy": ""},
        {"name": "torch", "status": "ok", "text": "2.13", "remedy": ""},
    ]
    (report := tmp_path / "preflight.json").write_text(json.dumps({"checks": checks}))
    found = judge_preflight(report)
    assert found.problems == ["driver: 525; install 580"] and found.warnings == ["disk: 1 GB"]


def test_a_job_that_hangs_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_run, "PATIENCE", 0.2)
    script = """if 1:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)"""
    log, seen = tmp_path / "log.txt", []
    status = run_job([sys.executable, "-c", script], log, os.environ, 2.0, lambda: seen.append(1))
    assert status is None and seen
    child = int(log.read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "its child still runs"
        time.sleep(0.05)
    problem = first_run.job_problem(None, 120, log)
    assert problem == f"the job was not done after 2 minutes: {child}"


@pytest.fixture
def passed(tmp_path: Path) -> FirstRun:
    """All rungs have passed; should one be run again, its job fails at once."""
    first = FirstRun(tmp_path / "out", True, 1, ("trainer.totl_epochs=1",))
    (first.out / "tiny").mkdir(parents=True)
    for number, rung in enumerate(TABLE):
        first.folder(rung).mkdir()
        findings = Findings(figures={"step_s": float(number)}, seconds=number)
        Passed(first.commands(rung), findings).save(first.folder(rung))
    return first


def test_rungs_that_have_passed_are_not_run_again(
    passed: FirstRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert climb(passed) == 0
    printed = capsys.readouterr().out
    assert printed.count("has passed before") == 5 and printed.count("it needs a GPU") == 1
    assert "  5  a tiny model, responses of full length" in printed
    assert "4.0 s a step" in printed
    # Those of other settings have not.
    rung = TABLE[1]
    for others in (replace(passed, devices=2), replace(passed, overrides=())):
        assert read_passed(others.folder(rung), others.commands(rung)) is None


def test_the_first_rung_that_fails_ends_it_with_files_to_attach(
    passed: FirstRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started with rung 2, although that has passed."""
    assert climb(passed, 2) == 1
    printed = capsys.readouterr().out
    assert "rung 1" not in printed and "rung 4" not in printed
    assert "the job ended with status 2: error: " in printed and "trainer.total_epochs" in printed
    archive = passed.out / "report.tar.gz"
    assert f"report rung 2 with the lines above, and attach {archive}" in printed
    with tarfile.open(archive) as opened:
        names = {name.removeprefix("first-run-report/") for name in opened.getnames()}
        assert {"report.txt", "rung-2-tiny-vllm-host/log.txt", "rung-1-tiny-hf/passed.json"} < names
        report = opened.extractfile("first-run-report/report.txt")
        assert report is not None
        text = report.read().decode()
    assert "rung 2 (a tiny model, vLLM" in text and "trainer.totl_epochs=1" in text
    # It goes on with this rung.
    assert read_passed(passed.folder(TABLE[2]), passed.commands(TABLE[2])) is None
    assert not any(line.startswith("  2 ") for line in table(passed))


def test_a_rung_is_a_real_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = FirstRun(tmp_path / "out", True, 1, (), TABLE[:2])
    with starting_warm():
        assert climb(first, 1) == 0, capsys.readouterr().out
        done = read_passed(first.folder(TABLE[1]), first.commands(TABLE[1]))
    printed = capsys.readouterr().out
    assert "step 1 of 3 made" in printed or "step 3 of 3 made" in printed
    assert done is not None and done.findings.warnings == []
    figures = done.findings.figures
    assert 0 < figures["difference"] < 1e-5 and figures["tokens_s"] > 0 and figures["step_s"] > 0
    assert {path.name for path in first.folder(TABLE[1]).iterdir()} > {"log.txt", "metrics.jsonl"}
    assert not (first.folder(TABLE[1]) / "huggingface").exists()


@pytest.mark.series(2)
@pytest.mark.parametrize("rung", TABLE[1:], ids=[rung.name for rung in TABLE[1:]])
def test_what_rungs_run_on_gpus(
    rung: Rung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PATH", "/models/mine")
    first = FirstRun(tmp_path, False, 3)
    environment = first.environment() | {"DRY_RUN": "quiet"}
    for job, command in zip(rung.jobs, first.commands(rung), strict=True):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        config = resolved(done)
        assert config["trainer.total_training_steps"] == job.last
        assert config["trainer.n_gpus_per_node"] == 3
        assert config["actor_rollout_ref.rollout.verify_weights"] is True
        assert config["trainer.default_local_dir"] == str(first.folder(rung))
        assert config["trainer.logger"] == ["console"]
        model = "/models/mine" if rung.script else f"{tmp_path}/tiny/model"
        assert config["actor_rollout_ref.model.path"] == model
        lengths = {"resume": 512, "full-length": 8192}
        assert config["data.max_response_length"] == lengths.get(rung.name, 64)


def test_the_script_needs_a_gpu_or_the_option_for_none(tmp_path: Path) -> None:
    empty = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    result = dry_run("first_run", "--out", str(tmp_path / "out"), DRY_RUN="0", **empty)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "no NVIDIA driver; --cpu" in result.stderr or "has no vLLM" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rung", "6"), "invalid choice: 6"),
        (("fresh",), "fresh is neither an option nor an override"),
        (("--sped",), "--sped"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    result = dry_run("first_run", "--cpu", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_a_wrong_override_is_no_rung_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = first_run.main(["--cpu", "--out", str(tmp_path / "out"), "bogus.key=1"])
    shown = capsys.readouterr()
    assert status == 2 and "there is no key 'bogus.key'" in shown.err
    assert "report" not in shown.out + shown.err and not (tmp_path / "out").exists()


def test_help_is_the_text_at_the_top_of_the_script() -> None:
    result = dry_run("first_run", "--help")
    assert result.returncode == 0 and "rung 5" in result.stdout and "--fresh" in result.stdout
    assert "#" not in result.stdout and "HERE=" not in result.stdout


def test_a_dry_run_prints_the_commands_and_makes_nothing(tmp_path: Path) -> None:
    result = dry_run("first_run", "--out", str(tmp_path / "out"), "a.b=1", MODEL_PATH="/models/M")
    assert result.returncode == 0, result.stderr
    commands = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 7 and commands[-1].endswith(" a.b=1")
    assert "# M, responses of full length" in result.stdout
    assert not (tmp_path / "out").exists()
