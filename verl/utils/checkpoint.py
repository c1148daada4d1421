"""Checkpoints: written aside, synced, renamed when complete, found again, checked.

default_local_dir/
  global_step_20/actor/          parameters, optimizer, schedule (torch.distributed.checkpoint)
  global_step_20/trainer.json    the driver's state, with the resolved configuration
  global_step_20/drawn.parquet   with trainer.async_rollout, the batch of the next step
  global_step_20/carried.parquet responses that DAPO's filter kept for the next step
  global_step_20/manifest.json   size and checksum of all these
  latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from verl.trainer.config.schema import TrainerConfig

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CHECKED_BYTES = 2**20
"""Of each file the first and the last so many bytes are compared with the manifest, beside its
size: that takes no time for any size of model, and finds what a crash leaves behind."""


LOCKS: dict[Path, TextIO] = {}
"""Of the folders that this process writes to; a killed one's are gone with it."""


class CheckpointFolder:
    """The checkpoints below `trainer.default_local_dir`."""

    def __init__(self, trainer: TrainerConfig) -> None:
        self.trainer = trainer
        self.root = Path(trainer.default_local_dir).expanduser().absolute()
        named = trainer.resume_from_path
        self.named = Path(named).expanduser().absolute() if named else None
        """What resume_mode=resume_path resumes from."""

    def make_root(self) -> None:
        """Makes the folder, and locks it until this process ends.

        Raises: ValueError if nothing can be written there, or another run does so.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".writable").touch()
            (self.root / ".writable").unlink()
        except OSError as error:
            raise ValueError(
                f"trainer.default_local_dir={self.root} can't be written: {error}"
            ) from None
        if self.root not in LOCKS:
            file = (self.root / ".lock").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run writes to trainer.default_local_dir={self.root}: wait for its "
                    "end, or give this one a trainer.experiment_name of its own"
                ) from None
            except OSError as error:  # file systems without locks
                logger.info("%s can't be locked: %s", self.root, error)
            LOCKS[self.root] = file

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], Any]) -> Path:
        """Writes a checkpoint of `step`. Until the last rename, the one before it is the latest.

        `state`: the driver's, JSON-able. `write` adds everything else to the folder it is given.

        Raises: OSError if the disk is full, or the like; what was there before is still there.
        """
        final = self.root / f"global_step_{step}"
        aside, replaced = (self.root / f"{final.name}.{end}" for end in ("tmp", "old"))
        self._undo_swap()
        for rest in self.root.glob("global_step_*.*"):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            write(aside)
            (aside / "trainer.json").write_text(json.dumps(state | {"step": step}))
            seal(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if final.exists():  # never without a whole one: `find` takes the old one back
            os.replace(final, replaced)
        os.replace(aside, final)
        sync(self.root)
        self._point_to(step)
        shutil.rmtree(replaced, ignore_errors=True)
        if limit := self.trainer.max_actor_ckpt_to_keep:
            kept = self.named and self.named.resolve()  # the user's
            others = (path for path in self.saved() if path.resolve() != kept)
            found = sorted(others, key=lambda p: (p == final, p.stat().st_mtime))
            for old in found[:-limit]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def saved(self) -> list[Path]:
        """All checkpoints' folders, damaged ones included."""
        found = self.root.glob("global_step_*")
        return [path for path in found if re.fullmatch(r"global_step_\d+", path.name)]

    def find(self, run_id: str | None = None) -> Path | None:
        """The checkpoint to resume from, as `trainer.resume_mode` says; None: start anew.

        `auto` takes the latest that is whole, with a warning if that isn't the last one written;
        with `run_id`, none of another run that used the folder before.

        Raises: ValueError if there is none, or the one that was named isn't whole.
        """
        if self.trainer.resume_mode == "disable":
            return None
        if self.trainer.resume_mode == "resume_path":
            folder = self.named or Path()
            if problem := damage(folder):
                text = f"trainer.resume_from_path={folder}: there is no whole checkpoint"
                raise ValueError(f"{text} ({problem}); name another folder called global_step_N")
            return folder
        self._undo_swap()
        latest = self.root / LATEST
        if not latest.is_file():
            return None
        last = latest.read_text().strip()
        problems = []
        steps = {int(path.name.rpartition("_")[2]): path for path in self.saved()}
        if last.isdecimal():
            steps.setdefault(int(last), self.root / f"global_step_{last}")
            for step in sorted((s for s in steps if s <= int(last)), reverse=True):
                if problem := damage(steps[step]):
                    problems.append(f"{steps[step].name}: {problem}")
                elif run_id in (None, self.read_state(steps[step]).get("run_id", run_id)):
                    if problems:
                        text = "resuming from %s, as what was written later is damaged (%s)"
                        logger.warning(text, steps[step], "; ".join(problems))
                    return steps[step]
        raise ValueError(
            f"{latest} names step {last or 'none'}, but no checkpoint of this run is whole "
            f"({'; '.join(problems)}): bring one back, or start anew with "
            "trainer.resume_mode=disable"
        )

    def forget(self) -> None:
        """What a new run in a used folder does: its predecessor's checkpoints stay, but nothing
        resumes from them by itself."""
        (self.root / LATEST).unlink(missing_ok=True)

    @staticmethod
    def read_state(folder: Path) -> dict[str, Any]:
        """The driver's state of a checkpoint, with `step`."""
        return json.loads((folder / "trainer.json").read_text())

    def _point_to(self, step: int) -> None:
        aside = self.root / f"{LATEST}.tmp"
        aside.write_text(str(step))
        sync(aside)
        os.replace(aside, self.root / LATEST)
        sync(self.root)

    def _undo_swap(self) -> None:
        """Takes a checkpoint back that was about to be replaced when the run was killed."""
        for old in self.root.glob("global_step_*.old"):
            if not old.with_suffix("").exists():
                os.replace(old, old.with_suffix(""))


def seal(folder: Path) -> None:
    """Writes the manifest of all files in `folder`, and waits until they are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))
    folders = {path.parent for path in files}
    for path in [*files, folder / MANIFEST, *folders, folder, folder.parent]:
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole, as far as its manifest tells."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        for name, entry in entries.items():
            if _fingerprint(folder / name) != entry:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} or a file that it names can't be read: {error}"
    return None if "trainer.json" in entries else "trainer.json is missing"


def sync(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that can't
            raise
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> list[Any]:
    """Size in bytes, and SHA-256 of both ends (of all, if it isn't longer than these)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(CHECKED_BYTES))
        file.seek(max(file.tell(), size - CHECKED_BYTES))
        digest.update(file.read())
    return [size, digest.hexdigest()]
