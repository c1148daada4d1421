"""Checkpoint folders: written aside, renamed, found again, deleted when old."""

import errno
import json
import os
import shutil
import subprocess
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import make_samples, warm_python
from verl.config.schema import Config, TrainerConfig
from verl.trainer.main_export import find_checkpoint
from verl.trainer.ppo.batches import BatchesState, TrainBatch, split_groups
from verl.trainer.ppo.checkpoint import (
    LATEST,
    MANIFEST,
    CheckpointFolder,
    TrainState,
    read_state,
)
from verl.trainer.ppo.tracking import RUN_ID, Tracking, make_folder, owner, read_metrics


def folder(root: Path, **settings) -> CheckpointFolder:
    trainer = TrainerConfig(default_local_dir=str(root), **settings)
    return CheckpointFolder(Config(trainer=trainer))


def state(step: int, **fields) -> TrainState:
    batches = BatchesState({"batches_taken": 3})
    return TrainState(**({"batches": batches, "step": step, "kl_coef": 0.25} | fields))


def save_actor(content: str = "weights"):
    def save(path: Path) -> None:
        (path / "actor").mkdir()
        (path / "actor" / "shard").write_text(content)

    return save


def names(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name != ".lock")


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
    assert names(root) == ["global_step_20", LATEST]
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


@pytest.mark.parametrize(("limit", "kept"), [(1, [7]), (2, [6, 7]), (0, [5, 6, 7])])
def test_older_ones_are_deleted(limit, kept, tmp_path):
    for step in (5, 6, 7):
        folder(tmp_path, max_actor_ckpt_to_keep=limit).save(state(step), save_actor())
    assert steps(tmp_path) == kept


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
    from verl.trainer.ppo.tracking import make_folder

    make_folder({str(tmp_path)!r})
    """
    other = [warm_python(), "-c", textwrap.dedent(program)]
    assert subprocess.run(other).returncode == 0
    for _ in range(2):
        make_folder(tmp_path)
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
    assert names(tmp_path) == [new.name, LATEST]


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


@pytest.mark.parametrize(
    "content", ["9", "", "ten", "global_step_20", "٢٠", "9" * 5000, b"\xff\xfe2\x000\x00"]
)
def test_nonsense_about_the_latest_is_a_warning(tmp_path, content, caplog):
    checkpoints = folder(tmp_path)
    for step in (10, 20):
        checkpoints.save(state(step), save_actor())
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / LATEST).write_bytes(content)
    assert checkpoints.find() == find_checkpoint(tmp_path) == tmp_path / "global_step_20"
    (first, second) = caplog.messages
    assert first == second and f"global_step_20 ({LATEST} names " in first and len(first) < 400
    cut(tmp_path / "global_step_20" / MANIFEST)
    assert checkpoints.find() == tmp_path / "global_step_10"
    cut(tmp_path / "global_step_10" / MANIFEST)
    for find in (checkpoints.find, lambda: find_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=r"no checkpoint.* whole .*trainer\.resume_mode=dis"):
            find()


@pytest.mark.parametrize("content", ["10\n", "\ufeff10\r\n", " 10 "])
def test_what_editors_add_to_the_latest_is_none(tmp_path, content, caplog):
    checkpoints = folder(tmp_path)
    for step in (10, 20):
        checkpoints.save(state(step), save_actor())
    (tmp_path / LATEST).write_text(content)
    assert checkpoints.find() == find_checkpoint(tmp_path) == tmp_path / "global_step_10"
    assert not caplog.records


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
        (path / "actor" / "big").write_bytes(b"x" * 6 * 2**20)

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
    run_id.write_text("new")
    with pytest.raises(ValueError, match="no checkpoint of the run"):
        checkpoints.find()
    last = checkpoints.save(state(20), save_actor())
    assert checkpoints.find() == last
    cut(last / "trainer.json")
    with pytest.raises(ValueError, match="no checkpoint of the run"):
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
        7,
        batches=batches,
        skipped_by_model={"actor": 2},
        validation_due=True,
        best={"val-core/best_acc": 0.5},
    )
    checkpoints = folder(tmp_path)
    prompts = [samples[i].prompt for i in (0, 2, 4)]
    loaded = folder(tmp_path).load(checkpoints.save(saved, save_actor()), prompts)
    for name in ("step", "kl_coef", "skipped_by_model", "validation_due", "best"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.batches.order == batches.order
    assert loaded.batches.prefetched.metrics == batches.prefetched.metrics
    found = [s for group in loaded.batches.carried for s in group]
    assert [len(group) for group in loaded.batches.carried] == [2, 2]
    for a, b in zip([*found, *loaded.batches.prefetched.samples], samples, strict=True):
        assert a.prompt is b.prompt
        for f in fields(a):
            np.testing.assert_equal(getattr(a, f.name), getattr(b, f.name), f.name)


@pytest.mark.parametrize("survived", [0, 1])
def test_killed_while_a_step_is_saved_again(tmp_path, monkeypatch, survived):
    """The run has gone back to step 10. Whichever rename comes last, there is a whole one."""
    for step in (10, 20):
        folder(tmp_path).save(state(step), save_actor("old"))
    kill_at_rename(monkeypatch, survived)
    with pytest.raises(Killed):
        folder(tmp_path).save(state(20), save_actor("new"))
    monkeypatch.undo()
    found = folder(tmp_path).find()
    assert found.name == ("global_step_10", "global_step_20")[survived]
    assert (found / "actor" / "shard").read_text() == ("old", "new")[survived]
    new = folder(tmp_path).save(state(20), save_actor("newest"))
    assert (new / "actor" / "shard").read_text() == "newest"
    assert names(tmp_path) == ["global_step_10", new.name, LATEST]


def test_a_full_disk_costs_only_the_save(tmp_path):
    checkpoints = folder(tmp_path, max_actor_ckpt_to_keep=1)
    old = checkpoints.save(state(10), save_actor())

    def full(path):
        save_actor("half")(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(state(20), full)
    assert names(tmp_path) == [old.name, LATEST]  # what was half written makes room
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


def begin(checkpoints: CheckpointFolder, *saved: int) -> Path | None:
    """What a run does: it resumes, opens its metrics, and writes these checkpoints, with a line for
    each step. Returns what it has resumed from."""
    checkpoints.trainer.logger = "file"
    resumed, step = checkpoints.find(), 0
    if resumed:
        step = checkpoints.load(resumed, []).step
    root, run_id = checkpoints.root, checkpoints.run_id
    with Tracking(checkpoints.config, root, run_id, 100, step, None) as tracking:
        for step in saved:
            tracking.log({"x": step}, step)
            checkpoints.save(state(step), save_actor(f"of {owner(root)}"))
    return resumed


def tree(folder: Path) -> dict[str, bytes]:
    """All that a run left in its folder."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    others = ("earlier_run_", ".lock", "val_only/.lock")
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith(others)}


@pytest.mark.parametrize("where", ["disable", "resume_path"])
def test_a_new_run_in_a_used_folder_touches_nothing_of_the_earlier_one(tmp_path, where, caplog):
    """Not even with the same steps, and when it may keep one checkpoint only."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    begin(folder(elsewhere), 5)
    for step in (5, 9, 20):
        begin(folder(here), step)
    left, named = tree(here), elsewhere / "global_step_5"
    assert {"global_step_5/trainer.json", "global_step_20/trainer.json", RUN_ID} <= left.keys()
    path = {"resume_from_path": str(named)} if where == "resume_path" else {}
    settings = {"max_actor_ckpt_to_keep": 1, "resume_mode": where} | path
    assert begin(folder(here, **settings), 7, 9) == (named if path else None)
    (moved,) = here.glob("earlier_run_*")
    assert tree(moved) == left
    assert sum(str(moved) in message for message in caplog.messages) == 1
    assert steps(here) == [9] and [r["step"] for r in read_metrics(here / "metrics.jsonl")] == [
        7,
        9,
    ]
    mine = owner(here)
    assert mine not in (owner(moved), owner(elsewhere))
    assert read_state(here / "global_step_9")["run_id"] == mine
    # Each goes on where it is.
    assert begin(folder(here), 30) == here / "global_step_9" and owner(here) == mine
    assert begin(folder(moved), 30) == moved / "global_step_20"
    assert [r["step"] for r in read_metrics(moved / "metrics.jsonl")] == [5, 9, 20, 30]
    assert len(list(tmp_path.rglob("earlier_run_*"))) == 1


def test_a_run_that_goes_back_stays_in_its_folder(tmp_path, caplog):
    begin(folder(tmp_path), 5, 9, 20)
    named = tmp_path / "x" / ".." / "global_step_5"
    checkpoints = folder(tmp_path, resume_mode="resume_path", resume_from_path=str(named))
    before = owner(tmp_path)
    assert begin(checkpoints, 9) == tmp_path / "global_step_5"
    assert owner(tmp_path) == before and steps(tmp_path) == [5, 9, 20]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5, 9]
    assert folder(tmp_path).find() == tmp_path / "global_step_9"
    assert not list(tmp_path.glob("earlier_run_*"))


def test_without_its_id_a_run_goes_on_all_the_same(tmp_path):
    begin(folder(tmp_path), 5)
    lost = owner(tmp_path)
    (tmp_path / RUN_ID).unlink()
    assert begin(folder(tmp_path), 6) == tmp_path / "global_step_5"
    assert owner(tmp_path) == lost == read_state(tmp_path / "global_step_6")["run_id"]
    assert not list(tmp_path.glob("earlier_run_*"))


def test_another_runs_checkpoint_in_its_folder_is_not_resumed(tmp_path):
    begin(folder(tmp_path / "other"), 5)
    begin(folder(tmp_path), 9)
    before = tree(tmp_path)
    copy = shutil.copytree(tmp_path / "other" / "global_step_5", tmp_path / "global_step_5")
    with pytest.raises(ValueError, match=r"of another run than its folder: move it elsewhere"):
        begin(folder(tmp_path, resume_mode="resume_path", resume_from_path=str(copy)))
    shutil.rmtree(copy)
    assert tree(tmp_path) == before


def test_an_evaluation_finds_the_runs_checkpoints_and_is_a_run_of_its_own(tmp_path):
    begin(folder(tmp_path), 5)
    before = tree(tmp_path)
    make_folder(tmp_path)  # the run is still under way
    evaluation = folder(tmp_path, val_only=True)
    assert begin(evaluation) == tmp_path / "global_step_5"
    assert evaluation.root == tmp_path / "val_only" and evaluation.run_id == ""
    new = tree(tmp_path).items() - before.items()
    assert {name.split("/")[0] for name, _ in new} == {"val_only"}
    assert before.items() <= tree(tmp_path).items()
