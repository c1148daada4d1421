"""metrics.jsonl, the console, wandb and TensorBoard."""

import html
import json
import math
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import termios
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.helpers import make_samples, warm_python
from verl.config.schema import Config, TrainerConfig
from verl.trainer.ppo.loggers import (
    Logger,
    Run,
    generations_markdown,
    start_tensorboard,
)
from verl.trainer.ppo.tracking import (
    CONSOLE_COLUMNS,
    LATEST,
    RUN_ID,
    Tracking,
    claim,
    owner,
    read_metrics,
    step_line,
    validation_table,
)

STEP = {
    "critic/rewards/mean": 0.5,
    "reward/acc": 0.25,
    "response_length/mean": 231.44,
    "actor/entropy": 1.25,
    "actor/grad_norm": 0.125,
    "perf/throughput": 1234.0,
    "perf/time_per_step": 9.96,
}
VALIDATION = {
    "val-core/countdown/acc/mean@4": 0.25,
    "val-core/countdown/acc/best@4/mean": 0.75,
    "val-core/openai/gsm8k/acc/mean@1": 0.5,
    "val-aux/countdown/acc/best@2/mean": 0.5,
    "val-aux/countdown/response_length/mean": 200.0,
    "val-aux/countdown/response_length/clip_ratio": 0.125,
}

HOSTILE = """</pre><script>alert(1)</script> <!-- ![x](http://e/x.png) </td>|a|b|

``` &amp; <b>
**2**, score 1
\r\x00\x02\u2028    **bold**"""
GENERATIONS = [("1 + 1 =", HOSTILE, 0.0), ("1 + 2 =", "3", 1.0)]


def generations_tokenizer():
    """One whose tokens are the texts of `GENERATIONS`."""
    texts = ["<unk>", *(text for *pair, _ in GENERATIONS for text in pair)]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def generation_samples():
    """They are shown in another order than they have here."""
    samples = make_samples([1, 1], prompt_length=1, finish_reason="length")
    for i, (sample, (_, _, score)) in enumerate(zip(samples, GENERATIONS, strict=True)):
        sample.prompt = replace(sample.prompt, token_ids=np.array([2 * i + 1]))
        sample.response_ids, sample.score = np.array([2 * i + 2]), score
    return [samples[i] for i in np.argsort(np.random.default_rng(0).permutation(2))]


def tracking(run_dir, *loggers, step=0, **settings):
    """Of a run that goes on, if there is a `step`."""
    settings = {"logger": list(loggers) or "file", "log_val_generations": 2} | settings
    config = Config(trainer=TrainerConfig(project_name="p", experiment_name="e", **settings))
    run_id = (owner(run_dir) or "lost") if step else ""
    return Tracking(config, run_dir, run_id, 100, step, generations_tokenizer())


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_one_line_a_step_at_once_on_disk(tmp_path):
    run = tmp_path / "made" / "on the way"
    with tracking(run) as t:
        t.log_validation({"val-core/a/acc/mean@1": np.float32(0.5)}, step=0)
        t.log({"x": 1}, step=1)
        assert read_metrics(run / "metrics.jsonl")[1] == {"step": 1, "x": 1.0}
        t.log_validation({"val-core/a/acc/mean@1": True}, step=2)
        t.log({"x": np.int64(2)}, step=2)
    text = (run / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 0, "val-core/a/acc/mean@1": 0.5}\n'
        '{"step": 1, "x": 1.0}\n'
        '{"step": 2, "val-core/a/acc/mean@1": 1.0, "x": 2.0}\n'
    )
    assert names(run) == ["config.yaml", "metrics.jsonl", "wandb_run_id"]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    with tracking(tmp_path) as t:
        t.log({"a": math.nan, "b": math.inf, "c": 1}, step=1)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "a": null, "b": null, "c": 1.0}\n'


def test_resume_drops_the_lines_after_the_checkpoint(tmp_path):
    with tracking(tmp_path) as t:
        for step in range(1, 6):
            t.log({"x": step, "bad": math.nan}, step)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "x"')  # killed while writing
    with tracking(tmp_path, step=3) as t:
        t.log_validation({"v": 1}, step=3)  # a validation before training goes on
        t.log({"x": 40}, step=4)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["x"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert records[2] == {"step": 3, "x": 3.0, "bad": None, "v": 1.0}


def test_resume_at_the_half_written_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x":')
    with tracking(tmp_path, step=2) as t:
        t.log({"x": 3}, step=3)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_resume_without_a_file(tmp_path):
    with tracking(tmp_path, step=7) as t:
        t.log({}, step=8)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 8}]


def test_a_new_run_starts_its_metrics_anew(tmp_path):
    for value in (1, 2):
        with tracking(tmp_path) as t:
            t.log({"x": value}, step=0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "x": 2.0}]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        tracking(tmp_path, step=3)
    assert "oops" in (tmp_path / "metrics.jsonl").read_text()


def test_step_line():
    assert step_line(STEP | VALIDATION, 7, 100) == (
        "step   7/100  reward  0.500  acc 0.250  len   231  entropy 1.250  grad  0.125"
        "    1234 tok/s    10.0 s"
    )
    assert step_line({"actor/grad_norm": None}, 1, 9) == "step 1/9  grad    nan"
    long = dict.fromkeys(CONSOLE_COLUMNS, -1.0) | {"perf/throughput": 2e5, "reward/acc": 1.0}
    long |= {"response_length/mean": 2e4, "actor/grad_norm": 20.0, "perf/time_per_step": 2e3}
    assert len(step_line(long | {"actor/entropy": 1.0}, 12345, 99999)) <= 120


def test_validation_table():
    assert validation_table(VALIDATION).splitlines() == [
        "  data source   mean@4  best@4  length  truncated  mean@1",
        "  countdown      0.250   0.750   200.0      12.5%",
        "  openai/gsm8k                                      0.500",
    ]
    assert validation_table({"val-core/chat/reward/mean@1": -0.25}).splitlines() == [
        "  data source  reward mean@1",
        "  chat                -0.250",
    ]


def test_console_without_a_terminal_prints_plain_lines(tmp_path, capsys):
    with tracking(tmp_path, "console") as t:
        t.log_validation(VALIDATION, step=1)
        t.log(STEP, step=1)
        t.log(STEP, step=2)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "validation at step 1" and lines[2].startswith("  countdown ")
    assert lines[4:] == [step_line(STEP | VALIDATION, 1, 100), step_line(STEP, 2, 100)]
    assert err == ""


def test_console_in_a_terminal_shows_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with tracking(tmp_path, "console", step=40) as t:
        t.log(STEP, step=41)
    out, err = capsys.readouterr()
    assert out == step_line(STEP, 41, 100) + "\n"
    assert " 40/100 " in err and "<" in err


def test_lines_of_the_log_do_not_end_in_a_progress_bar(tmp_path):
    code = (
        "import logging, pathlib, sys\n"
        "from verl.config.load import entry_point\n"
        "from verl.trainer.ppo.tracking import Tracking\n"
        "def run(config):\n"
        "    with Tracking(config, pathlib.Path(folder), '', 2, 0, None) as tracking:\n"
        "        tracking.log({'x': 1}, 1)\n"
        "        logging.warning('hello')\n"
        "folder = sys.argv.pop()\n"
        "entry_point(run, 'sft_trainer')\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    arguments = ["trainer.logger=console", tmp_path]
    subprocess.run([sys.executable, "-c", code, *arguments], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert " 0/2 " in shown and re.search(r"\r *\rWARNING hello\r\n", shown)
    assert re.search(r"\r *\r$", shown), "nothing is left of the bar"


def test_other_loggers_print_nothing(tmp_path, capsys):
    with tracking(tmp_path, "file") as t:
        t.log_validation(VALIDATION, step=1)
        t.log(STEP, step=1)
    assert capsys.readouterr() == ("", "")


def test_wandb_offline_and_resumed(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    with tracking(run, "wandb") as t:
        t.log_validation(VALIDATION, step=0)
        t.log(STEP, step=1)
        summary, first = dict(wandb.run.summary), wandb.run.id
        assert wandb.run.settings.mode == "offline" and wandb.run.step == 2
    assert summary["critic/rewards/mean"] == 0.5
    assert summary["val-core/countdown/acc/mean@4"] == 0.25
    assert capfd.readouterr().err.count("no WANDB_API_KEY") == 1

    monkeypatch.setenv("WANDB_MODE", "disabled")
    for step, same in ((1, True), (0, False)):
        with tracking(run, "wandb", step=step) as t:
            assert ((run / "wandb_run_id").read_text() == first) is same
    assert "no WANDB_API_KEY" not in capfd.readouterr().err
    assert list(run.glob(f"earlier_run_*/wandb/offline-run-*-{first}"))


def test_generations_are_one_growing_table_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking(tmp_path, "wandb") as t:
        for step in (0, 2):
            t.log_validation(VALIDATION, step, generation_samples())
            t.log(STEP, step)
        assert wandb.run.summary["val/generations"]["nrows"] == 2
        assert wandb.run.summary["val-core/countdown/acc/mean@4"] == 0.25
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("generations*.table.json")]
    assert len(tables) == 2  # each upload holds what is new
    assert {tuple(table["columns"]) for table in tables} == {
        ("step", "input_1", "output_1", "score_1", "input_2", "output_2", "score_2")
    }
    rows = sorted(row for table in tables for row in table["data"])
    assert rows == [[step, "1 + 1 =", HOSTILE, 0.0, "1 + 2 =", "3", 1.0] for step in (0, 2)]


def events(folder):
    """What TensorBoard shows."""
    return EventAccumulator(str(folder)).Reload()


def scalars(folder, name):
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_tensorboard_shows_each_step_once(tmp_path):
    with tracking(tmp_path, "tensorboard") as t:
        t.log_validation(VALIDATION, 0, generation_samples())
        for step in range(1, 6):
            t.log({"actor/entropy": step, "bad": math.nan}, step)
        seen = scalars(tmp_path / "tensorboard", "actor/entropy")  # a kill would lose nothing
    assert seen == [(step, float(step)) for step in range(1, 6)]
    with tracking(tmp_path, "tensorboard", step=3) as t:
        t.log_validation({"val-core/countdown/acc/mean@4": 0.5}, 3)
        t.log({"actor/entropy": 40}, 4)
    board = tmp_path / "tensorboard"
    assert scalars(board, "actor/entropy") == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert scalars(board, "val-core/countdown/acc/mean@4") == [(0, 0.25), (3, 0.5)]
    bad = scalars(board, "bad")
    assert [step for step, _ in bad] == [1, 2, 3] and all(math.isnan(x) for _, x in bad)
    with tracking(tmp_path, "tensorboard") as t:  # a new run
        t.log({"actor/entropy": 7}, 1)
    assert scalars(board, "actor/entropy") == [(1, 7)]


def test_the_folder_of_tensorboard_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "elsewhere"))
    with tracking(tmp_path / "run", "tensorboard") as t:
        t.log({"x": 1}, 1)
    assert scalars(tmp_path / "elsewhere", "x") == [(1, 1)]
    assert not (tmp_path / "run" / "tensorboard").exists()
    with tracking(tmp_path / "another", "tensorboard") as t:
        t.log({"x": 2}, 1)
    assert scalars(tmp_path / "elsewhere", "x") == [(1, 2)]
    (moved,) = (tmp_path / "elsewhere").glob("earlier_run_*")
    assert scalars(moved, "x") == [(1, 1)]  # which TensorBoard shows as another run


def test_generations_in_tensorboard_are_text_that_breaks_nothing(tmp_path):
    with tracking(tmp_path, "tensorboard") as t:
        t.log_validation({}, 4, generation_samples())
    (event,) = events(tmp_path / "tensorboard").Tensors("val/generations/text_summary")
    (written,) = event.tensor_proto.string_val
    assert event.step == 4 and written.decode() == generations_markdown(GENERATIONS)
    page = markdown_to_safe_html(written.decode())  # as TensorBoard makes it
    headings = ["<strong>1</strong>, score 0", "<strong>2</strong>, score 1"]
    assert [line for line in page.splitlines() if "strong" in line] == [
        f"<p>{heading}</p>" for heading in headings
    ]
    assert page.count("<pre>") == page.count("</pre>") == 4
    assert set(re.findall(r"<(\w+)", page)) == {"p", "strong", "pre"}
    shown = html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[1])
    assert shown.startswith("</pre><script>alert(1)</script> <!-- ![x](http://e/x.png) </td>|a|b|")
    assert "\n\n``` &amp; <b>\n**2**, score 1\n" in shown and shown.endswith("    **bold**")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_tensorboard_alone(tmp_path, caplog):
    with tracking(tmp_path, "tensorboard") as t:
        t.log({"x": 1}, step=1)
        written = next((tmp_path / "tensorboard").iterdir()).stat().st_size
        with longest_file(written + 5):
            t.log({"x": 2}, step=2)
        t.log({"x": 3}, step=3)
    assert caplog.text.count("TensorBoard: ") == caplog.text.count("this logger gets no more") == 1
    assert [r["x"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    with tracking(tmp_path, "tensorboard", step=1) as t:
        t.log({"x": 2}, step=2)
    assert scalars(tmp_path / "tensorboard", "x") == [(1, 1), (2, 2)]


def broken(*_: object) -> None:
    raise RuntimeError("no more")


def closed(failed: bool) -> None:
    raise AssertionError("left out by then")


def test_a_logger_that_fails_costs_itself_alone(tmp_path, caplog):
    with tracking(tmp_path) as t:
        t.loggers += [
            Logger("Broken", broken, closed),
            start_tensorboard(Run(Config(), tmp_path, "", 0, tmp_path / "tensorboard")),
        ]
        for step in (1, 2):
            t.log({"x": step}, step)
    assert caplog.text.count("Broken: RuntimeError: no more; this logger gets no more") == 1
    assert [r["x"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert scalars(tmp_path / "tensorboard", "x") == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("project", "problem"), [("a/b", "UsageError"), (None, "ModuleNotFoundError")]
)
def test_a_logger_that_does_not_start_costs_itself_alone(
    tmp_path, monkeypatch, caplog, project, problem
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if project is None:
        monkeypatch.setitem(sys.modules, "wandb", None)  # as if it weren't installed
    trainer = TrainerConfig(logger=["wandb", "tensorboard"], project_name=project or "p")
    with Tracking(Config(trainer=trainer), tmp_path, "", 9, 0, None) as t:
        t.log({"x": 1}, step=1)
    assert f"wandb: {problem}: " in caplog.text and caplog.text.count("ERROR") == 1
    assert scalars(tmp_path / "tensorboard", "x") == [(1, 1)]


def test_wandb_may_be_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking(tmp_path, "wandb") as t:
        t.log({"x": 1}, step=1)
        children = psutil.Process().children(recursive=True)
        service = [child for child in children if "wandb-core" in child.name()]
        assert service
        for process in service:
            process.kill()
        psutil.wait_procs(service, timeout=10)
        for step in (2, 3):
            t.log({"x": step}, step=step)
    with suppress(ConnectionError):
        wandb.teardown()
    assert caplog.text.count("Wandb: ") == 1
    assert [r["x"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_responses_that_can_not_be_kept_stop_nothing(tmp_path, caplog):
    folders = {f"{kind}_data_dir": str(tmp_path / kind) for kind in ("rollout", "validation")}
    samples = make_samples([2], extras={"acc": 1.0})
    with tracking(tmp_path / "run", **folders) as t:
        for folder in map(Path, folders.values()):
            shutil.rmtree(folder)
            folder.touch()
        t.dump("rollout", samples, 3)
        t.log_validation({"x": 1}, 3, samples)
        t.tokenizer = None  # whatever it is that fails
        t.log_validation({"x": 1}, 3, samples)
    for kind in ("rollout", "validation"):
        assert f"trainer.{kind}_data_dir: FileExistsError" in caplog.text
    assert "trainer.log_val_generations: AttributeError" in caplog.text


def test_an_error_closes_the_loggers_and_goes_on(tmp_path):
    with pytest.raises(ZeroDivisionError), tracking(tmp_path) as t:
        t.log({"x": 1}, step=1)
        _ = 1 / 0
    assert t.file.file.closed
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "x": 1.0}


@contextmanager
def longest_file(size):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_no_line(tmp_path, caplog):
    """The file may not grow beyond some bytes, then it may."""
    path = tmp_path / "metrics.jsonl"
    with tracking(tmp_path) as t:
        t.log({"x": 1}, step=1)
        t.log_validation({"val-core/a/acc/mean@1": 0.5}, step=2)
        with longest_file(path.stat().st_size + 5):
            t.log({"x": 2}, step=2)
            t.log_validation({"val-core/a/acc/mean@1": 0.25}, step=3)
            t.log({"x": 3}, step=3)
            assert not t.file.flush()
        assert "metrics.jsonl" in caplog.text
        t.log({"x": 4}, step=4)
    assert read_metrics(path) == [
        {"step": 1, "x": 1.0},
        {"step": 2, "val-core/a/acc/mean@1": 0.5, "x": 2.0},
        {"step": 3, "val-core/a/acc/mean@1": 0.25, "x": 3.0},
        {"step": 4, "x": 4.0},
    ]


def test_lines_that_wait_are_written_when_there_is_room(tmp_path):
    with tracking(tmp_path) as t:
        with longest_file(5):
            t.log({"x": 1}, step=1)
        assert read_metrics(tmp_path / "metrics.jsonl") == []
        assert t.file.flush()
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 1.0}]


def test_lines_that_wait_at_the_end_are_written(tmp_path):
    with tracking(tmp_path) as t, longest_file(5):
        t.log({"x": 1}, step=1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 1.0}]


LEFT = (
    "global_step_5/trainer.json",
    "global_step_5/actor/shard",
    "global_step_9/trainer.json",
    "global_step_12.tmp/actor/shard",
    LATEST,
    "metrics.jsonl",
    "config.yaml",
    "wandb/offline-run-1/files/x",
    "tensorboard/events.out.tfevents.1.host",
    "events.out.tfevents.2.host",
    "huggingface/model.safetensors",
    "error.log",
    "skipped_step_3.parquet",
    "7.parquet",
    "val_only/metrics.jsonl",
)
"""What a run leaves in its folder, beside its id."""
STAYS = ("math_server.log", "notes.txt", "train.parquet", "model/config.json", "global_step_best/x")
"""What is somebody else's."""


def write_files(folder: Path, files, run_id: str | None = "old") -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {run_id}: {name}")
    if run_id is not None:
        (folder / RUN_ID).write_text(run_id)


def contents(folder: Path) -> dict[str, str]:
    """All files below it but locks, and what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.mark.parametrize("run_id", ["old", None])
def test_what_another_run_left_is_moved_aside(tmp_path, caplog, run_id):
    root, rollouts = tmp_path / "run", tmp_path / "rollouts"
    write_files(root, LEFT, run_id)
    write_files(rollouts, ["1.parquet", "2.parquet"], run_id)
    left, dumps = contents(root), contents(rollouts)
    write_files(root, STAYS, run_id)
    settings = {
        "rollout_data_dir": str(rollouts),
        "validation_data_dir": str(root / "validation"),
    }
    write_files(root / "validation", ["0.parquet"], run_id)
    with tracking(root, **settings) as t:
        t.log({"x": 1}, step=1)
    (moved,) = root.glob("earlier_run_*")
    without_id = {RUN_ID: ""} if run_id is None else {}
    assert contents(moved) == left | without_id
    assert contents(rollouts / moved.name) == dumps | without_id
    assert (root / "validation" / moved.name / "0.parquet").is_file()
    assert caplog.messages == [
        f"what another run left was moved to {moved}, {rollouts / moved.name}, "
        f"{root / 'validation' / moved.name}"
    ]
    assert names(root) == sorted(
        {name.split("/")[0] for name in STAYS}
        | {"config.yaml", "metrics.jsonl", RUN_ID, moved.name, "validation"}
    )
    assert read_metrics(root / "metrics.jsonl") == [{"step": 1, "x": 1.0}]
    # It is a run's folder again, and the next new run leaves it as it is.
    caplog.clear()
    with tracking(root, **settings) as t:
        t.log({"x": 2}, step=1)
    assert contents(moved) == left | without_id
    (second,) = set(root.glob("earlier_run_*")) - {moved}
    assert read_metrics(second / "metrics.jsonl") == [{"step": 1, "x": 1.0}]
    assert caplog.messages == [f"what another run left was moved to {second}"]  # no dumps were made


def test_a_run_that_goes_on_moves_nothing_but_the_dumps_of_another(tmp_path, caplog):
    root, others, own = tmp_path / "run", tmp_path / "others", tmp_path / "own"
    write_files(root, [name for name in LEFT if name != "metrics.jsonl"])
    write_files(own, ["1.parquet"])
    write_files(others, ["1.parquet"], "another")
    before = contents(root)
    folders = {"rollout_data_dir": str(others), "validation_data_dir": str(own)}
    with tracking(root, step=9, **folders):
        pass
    assert {name: text for name, text in contents(root).items() if name in before} == (
        before | {"config.yaml": (root / "config.yaml").read_text()}
    )
    (moved,) = tmp_path.rglob("earlier_run_*")
    assert moved.parent == others and contents(own)["1.parquet"] == "of old: 1.parquet"
    assert owner(others) == owner(own) == owner(root) == "old" and owner(moved) == "another"
    assert caplog.messages == [f"what another run left was moved to {moved}"]


def test_an_id_that_got_lost_is_written_again(tmp_path, caplog):
    write_files(tmp_path, LEFT, None)
    before = contents(tmp_path)
    for _ in range(2):
        assert claim({"trainer.default_local_dir": tmp_path}, "old") == "old"
        assert contents(tmp_path) == before | {RUN_ID: "old"}
        (tmp_path / RUN_ID).write_text("")  # as a full disk leaves it
    assert not caplog.records


def test_killed_while_files_are_moved(tmp_path, monkeypatch):
    """Whichever file was the last: all is there, and nothing resumes from half of it."""
    rename = Path.rename
    for number in count():
        root = tmp_path / str(number)
        write_files(root, LEFT)
        left = list(range(number))

        def kill(path, target, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", kill)
        try:
            claim({"trainer.default_local_dir": root}, "")
            break
        except KeyboardInterrupt:
            assert (root / LATEST).exists() is (number == 0)
        monkeypatch.undo()
        assert claim({"trainer.default_local_dir": root}, "") == owner(root) != "old"
        assert names(root) == [*sorted(p.name for p in root.glob("earlier_run_*")), RUN_ID]
        found = {}
        for folder in root.glob("earlier_run_*"):
            found |= {k: v for k, v in contents(folder).items() if k != RUN_ID}
        assert found == {name: f"of old: {name}" for name in LEFT}
    assert number == len({name.split("/")[0] for name in LEFT})


def test_two_runs_cannot_write_their_responses_to_one_folder(tmp_path):
    program = f"""if True:
    from pathlib import Path
    from verl.trainer.ppo.tracking import claim
    claim({{"trainer.rollout_data_dir": Path({str(tmp_path / "dumps")!r})}}, "")
    input()
    """
    command = [warm_python(), "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        while not (tmp_path / "dumps" / RUN_ID).exists():
            assert other.poll() is None
        with pytest.raises(ValueError, match=r"another run writes to trainer\.rollout_data_dir=/"):
            tracking(tmp_path / "run", rollout_data_dir=str(tmp_path / "dumps"))
        other.communicate(b"\n")


def test_an_evaluation_writes_beside_the_run(tmp_path, monkeypatch):
    """In folders that it shares with the run, too."""
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "board"))
    folders = {
        "rollout_data_dir": str(tmp_path / "rollouts"),
        "validation_data_dir": str(tmp_path / "validation"),
    }
    with tracking(tmp_path / "run", "tensorboard", **folders) as t:
        t.log_validation(VALIDATION, 3, generation_samples())
        t.log(STEP, 3)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    evaluation = tmp_path / "run" / "val_only"
    with tracking(evaluation, "tensorboard", val_only=True, **folders) as t:
        t.log_validation(VALIDATION, 3, generation_samples())
    assert all(path.read_bytes() == content for path, content in files.items())
    new = {path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {str(path.relative_to(tmp_path)).partition(".out.")[0] for path in new - set(files)} == {
        "run/val_only/metrics.jsonl",
        "run/val_only/config.yaml",
        "run/val_only/wandb_run_id",
        "board/val_only/wandb_run_id",
        "board/val_only/events",
        "validation/val_only/wandb_run_id",
        "validation/val_only/3.parquet",
    }
