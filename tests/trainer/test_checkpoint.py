"""Checkpoint folders: written aside, renamed, found again, deleted when old."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import make_samples
from verl.config.schema import Config, TrainerConfig
from verl.trainer.ppo.batches import BatchesState, TrainBatch, split_groups
from verl.trainer.ppo.checkpoint import (
    LATEST,
    MANIFEST,
    CheckpointFolder,
    TrainState,
    read_state,
)
from verl.trainer.ppo.tracking import RUN_ID


def folder(root: Path, **settings) -> CheckpointFolder:
    trainer = TrainerConfig(default_local_dir=str(root), **settings)
    return CheckpointFolder(Config(trainer=trainer))


def state(step: int, **fields) -> TrainState:
    batches = BatchesState({"batches_taken": 3})
    return TrainState(**({"batches": batches, "step": step, "kl_coef": 0.25} | fields))


def save_actor(content: str = "weights"):
    def save(path: Path) -> None:
        path.mkdir()
        (path / "shard").write_text(content)

    return save


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in root.glob("global_step_*"))


def test_saved_and_found(tmp_path):
    root = tmp_path / "runs" / "one"
    checkpoints = folder(root)
    assert checkpoints.find() is None
    saved = checkpoints.save(state(20), save_actor())
    assert saved == root / "global_step_20" == checkpoints.find()
    assert (saved / "actor" / "shard").read_text() == "weights"
    assert checkpoints.load(saved, []) == state(20)
    assert (checkpoints.latest, checkpoints.saved_step) == (saved, 20)
    assert json.loads((saved / "trainer.json").read_text())["kl_coef"] == 0.25
    assert sorted(os.listdir(root)) == ["global_step_20", LATEST]
    assert (root / LATEST).read_text() == "20"


def test_the_latest_is_the_last_one_saved(tmp_path):
    checkpoints = folder(tmp_path)
    for step in (8, 9, 10):
        checkpoints.save(state(step), save_actor())
    assert folder(tmp_path).find() == tmp_path / "global_step_10"
    assert steps(tmp_path) == [8, 9, 10]


def test_a_step_saved_again_replaces_the_old_files(tmp_path):
    checkpoints = folder(tmp_path)
    checkpoints.save(state(1), save_actor("old"))
    (tmp_path / "global_step_1" / "actor" / "more").write_text("old")
    saved = checkpoints.save(state(1, kl_coef=0.5), save_actor("new"))
    assert [path.read_text() for path in (saved / "actor").iterdir()] == ["new"]
    assert read_state(saved)["kl_coef"] == 0.5


@pytest.mark.parametrize(("limit", "kept"), [(1, [30]), (2, [10, 30]), (9, [5, 9, 10, 30])])
def test_old_ones_are_deleted(tmp_path, limit, kept):
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=limit)
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    for step in (5, 9, 10, 30):
        checkpoints.save(state(step), save_actor())
    assert steps(tmp_path) == kept
    assert (tmp_path / "huggingface").is_dir()
    assert (tmp_path / "metrics.jsonl").is_file()


def test_the_one_that_was_named_to_resume_from_is_never_deleted(tmp_path):
    named = folder(tmp_path).save(state(5), save_actor())
    path = f"{tmp_path}/x/../{named.name}"
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=1, resume_from_path=path)
    for step in (6, 7):
        checkpoints.save(state(step), save_actor())
    assert steps(tmp_path) == [5, 7]


def test_the_one_just_saved_is_never_deleted(tmp_path):
    folder(tmp_path).save(state(100), save_actor())
    # Training went back to an earlier step.
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=1)
    saved = checkpoints.save(state(20), save_actor())
    assert steps(tmp_path) == [20]
    assert checkpoints.find() == saved


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    """Another process can't, the same one may again, and one that is over is not in the way."""
    program = f"""
    from verl.config.schema import Config, TrainerConfig
    from verl.trainer.ppo.checkpoint import CheckpointFolder

    trainer = TrainerConfig(default_local_dir={str(tmp_path)!r})
    CheckpointFolder(Config(trainer=trainer)).make_root()
    """
    other = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(other).returncode == 0
    for _ in range(2):
        folder(tmp_path).make_root()
    failed = subprocess.run(other, capture_output=True, text=True)
    assert failed.returncode and f"another run writes to trainer.default_local_dir={tmp_path}" in (
        failed.stderr
    )


class Killed(BaseException):
    pass


def kill(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("next_step", [10, 20])
def test_killed_while_the_policy_is_written(tmp_path, next_step):
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=1)
    old = checkpoints.save(state(10), save_actor("old"))
    with pytest.raises(Killed):
        checkpoints.save(state(next_step), lambda path: (save_actor("half")(path), kill()))
    found = folder(tmp_path).find()
    assert found == old
    assert (found / "actor" / "shard").read_text() == "old"
    # The next run gets there again.
    new = checkpoints.save(state(next_step), save_actor("new"))
    assert checkpoints.find() == new
    assert (new / "actor" / "shard").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [new.name, LATEST]


def kill_at_rename(monkeypatch, survived):
    """Renames work `survived` times; the next one is where the process ends."""
    rename, left = os.replace, [survived]

    def replace(source, target):
        if left[0] == 0:
            kill()
        left[0] -= 1
        rename(source, target)

    monkeypatch.setattr("verl.trainer.ppo.checkpoint.os.replace", replace)


@pytest.mark.parametrize("survived", [0, 1])
def test_killed_before_a_rename(tmp_path, monkeypatch, survived):
    old = folder(tmp_path).save(state(10), save_actor())
    kill_at_rename(monkeypatch, survived)
    with pytest.raises(Killed):
        folder(tmp_path, max_actor_ckpt_to_keep=1).save(state(20), save_actor())
    monkeypatch.undo()
    assert folder(tmp_path).find() == old
    assert (old / "trainer.json").is_file()


def test_state_that_is_not_json_leaves_the_old_one_the_latest(tmp_path):
    checkpoints = folder(tmp_path)
    old = checkpoints.save(state(10), save_actor())
    with pytest.raises(TypeError):
        checkpoints.save(state(20, batches=BatchesState({"order": object()})), save_actor())
    assert checkpoints.find() == old


def test_resume_disabled(tmp_path):
    folder(tmp_path).save(state(10), save_actor())
    assert folder(tmp_path, resume_mode="disable").find() is None


def test_resume_from_a_path(tmp_path):
    other = folder(tmp_path / "other")
    for step in (10, 20):
        other.save(state(step), save_actor())
    path = tmp_path / "other" / "global_step_10"
    here = folder(tmp_path / "here", resume_mode="resume_path", resume_from_path=str(path))
    assert here.find() == path
    assert read_state(path)["step"] == 10


@pytest.mark.parametrize("path", ["nowhere/global_step_3", "", None])
def test_a_path_without_a_checkpoint_is_an_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    checkpoints = folder(tmp_path, resume_mode="resume_path", resume_from_path=path)
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path.*global_step_N"):
        checkpoints.find()


def test_without_a_whole_checkpoint_it_is_an_error(tmp_path):
    checkpoints = folder(tmp_path)
    checkpoints.save(state(10), save_actor())
    for number in ("9", "", "ten"):
        (tmp_path / LATEST).write_text(number)
        with pytest.raises(ValueError, match=r"latest_checkpointed.*trainer\.resume_mode=disable"):
            checkpoints.find()
    (tmp_path / LATEST).write_text("10\n")
    assert checkpoints.find() == tmp_path / "global_step_10"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda c: cut(c / "actor" / "shard"),
    "changed": lambda c: flip(c / "actor" / "shard"),
    "zeros at the end": lambda c: (c / "actor" / "big").write_bytes(
        b"x" * 5 * 2**20 + bytes(2**20)
    ),
    "no shard": lambda c: (c / "actor" / "shard").unlink(),
    "no state": lambda c: (c / "trainer.json").unlink(),
    "no manifest": lambda c: (c / MANIFEST).unlink(),
    "half a manifest": lambda c: cut(c / MANIFEST),
    "an empty manifest": lambda c: (c / MANIFEST).write_text("{}"),
    "another manifest": lambda c: (c / MANIFEST).write_text("[]"),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_recognised_and_the_one_before_it_taken(tmp_path, name, caplog):
    def write(path):
        save_actor("a shard's bytes")(path)
        (path / "big").write_bytes(b"x" * 6 * 2**20)

    checkpoints = folder(tmp_path)
    for step in (8, 9, 10):
        last = checkpoints.save(state(step), write)
    assert checkpoints.find() == last and not caplog.records
    DAMAGE[name](last)
    assert checkpoints.find() == tmp_path / "global_step_9"
    assert "global_step_10" in caplog.text and "global_step_9" in caplog.text
    named = folder(tmp_path, resume_mode="resume_path", resume_from_path=str(last))
    with pytest.raises(ValueError, match=r"resume_from_path=.*no whole checkpoint"):
        named.find()


def test_an_earlier_run_in_the_same_folder_is_never_resumed(tmp_path):
    checkpoints, run_id = folder(tmp_path), tmp_path / RUN_ID
    run_id.write_text("old")
    checkpoints.save(state(10), save_actor())
    checkpoints.forget()
    run_id.write_text("new")
    assert checkpoints.find() is None
    last = checkpoints.save(state(20), save_actor())
    assert checkpoints.find() == last
    cut(last / "trainer.json")
    with pytest.raises(ValueError, match="no checkpoint of this run is whole"):
        checkpoints.find()
    run_id.write_text("old")
    assert checkpoints.find() == tmp_path / "global_step_10"


def test_the_whole_state_comes_back(tmp_path):
    """Groups that are carried over, and a batch that is prefetched, with their prompts."""
    samples = make_samples([3, 2, 4, 1, 2, 2], old_log_probs=None, ref_log_probs=None)
    samples[2].loss_mask = np.array([True, False, True, True])
    for s in samples:
        s.prompt, s.advantage, s.extras = samples[s.group * 2].prompt, 0.0, {"acc": 1.0}
    batches = BatchesState(
        {"batches_taken": 3},
        carried=split_groups(samples[:4]),
        prefetched=TrainBatch(samples[4:], {"train/num_gen_batches": 2.0}),
    )
    saved = state(
        7, batches=batches, skipped_in_a_row=2, validation_due=True, best={"val-core/best_acc": 0.5}
    )
    checkpoints = folder(tmp_path)
    prompts = [samples[i].prompt for i in (0, 2, 4)]
    loaded = folder(tmp_path).load(checkpoints.save(saved, save_actor()), prompts)
    for name in ("step", "kl_coef", "skipped_in_a_row", "validation_due", "best"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.batches.order == batches.order
    assert loaded.batches.prefetched.metrics == batches.prefetched.metrics
    found = [s for group in loaded.batches.carried for s in group]
    assert [len(group) for group in loaded.batches.carried] == [2, 2]
    for a, b in zip([*found, *loaded.batches.prefetched.samples], samples, strict=True):
        assert a.prompt is b.prompt
        for f in fields(a):
            np.testing.assert_equal(getattr(a, f.name), getattr(b, f.name), f.name)


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_killed_while_a_step_is_saved_again(tmp_path, monkeypatch, survived):
    """Whichever of the three renames comes last: there is a whole checkpoint."""
    folder(tmp_path).save(state(10), save_actor("old"))
    kill_at_rename(monkeypatch, survived)
    with pytest.raises(Killed):
        folder(tmp_path).save(state(10), save_actor("new"))
    monkeypatch.undo()
    found = folder(tmp_path).find()
    assert (found / "actor" / "shard").read_text() == ("new" if survived == 2 else "old")
    new = folder(tmp_path).save(state(10), save_actor("newest"))
    assert (new / "actor" / "shard").read_text() == "newest"
    assert sorted(os.listdir(tmp_path)) == [new.name, LATEST]


def test_a_full_disk_costs_only_the_save(tmp_path):
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=1)
    old = checkpoints.save(state(10), save_actor())

    def full(path):
        save_actor("half")(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(state(20), full)
    assert sorted(os.listdir(tmp_path)) == [old.name, LATEST]  # what was half written makes room
    assert checkpoints.find() == old
    assert checkpoints.find() != checkpoints.save(state(20), save_actor()) == checkpoints.find()


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder(Path("~/runs")).root == tmp_path / "runs"


def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    saved = folder(tmp_path).save(state(3), save_actor())
    content = json.loads((saved / "trainer.json").read_text())
    del content["validation_due"]
    (saved / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another version.*validation_due.*resume_mode=disable"):
        folder(tmp_path).load(saved, [])
