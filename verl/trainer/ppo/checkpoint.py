"""Checkpoints: what is saved, and how it is written, found again and checked.

`global_step_N` holds `actor/` (parameters, optimizer, schedule), trainer.json (the rest of
`TrainState`, and the resolved configuration), the responses that wait for the next step
(carried.parquet, prefetched.parquet), and manifest.json (size and checksum of all these).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from verl.config.schema import Config
from verl.config.validate import changed_keys, same_validation
from verl.protocol import Prompt
from verl.trainer.ppo.batches import BatchesState, TrainBatch, split_groups
from verl.trainer.ppo.tracking import RUN_ID
from verl.utils.samples import read_samples, write_samples

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CARRIED, PREFETCHED = "carried.parquet", "prefetched.parquet"
CHECKED_BYTES = 2**20  # of each file's start and end are compared with the manifest
LOCKS: dict[Path, TextIO] = {}  # of the folders that this process writes to


@dataclass(slots=True)
class TrainState:
    """All that a resumed run needs of the driver to go on as if nothing had happened.

    Random numbers need no state: each generator is seeded with the configuration's seed and step.
    """

    batches: BatchesState  # position in the data, responses that wait for the next step
    step: int = 0  # training steps made
    kl_coef: float = 0.0  # of the KL term in the reward
    skipped_in_a_row: int = 0  # optimizer steps up to now that were not finite
    validation_due: bool = False  # the one after `step` was postponed
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best validation so far


SCALARS = [f.name for f in fields(TrainState) if f.name != "batches"]  # as they are in trainer.json


class CheckpointFolder:
    """The checkpoints below `trainer.default_local_dir`."""

    def __init__(self, config: Config) -> None:
        trainer = config.trainer
        self.config, self.trainer = config, trainer
        self.root = Path(trainer.default_local_dir).expanduser().absolute()
        named = trainer.resume_from_path
        self.named = Path(named).expanduser().absolute() if named else None  # for resume_path
        self.latest: Path | None = None  # the last that was written or, before that, resumed from
        self.saved_step = 0

    @property
    def run_id(self) -> str | None:
        """What tells this run from another in the same folder; None before it has begun."""
        path = self.root / RUN_ID
        return path.read_text().strip() if path.is_file() else None

    @property
    def how_to_resume(self) -> str:
        """What to tell users when the run ends too early."""
        if self.latest is None:
            return "no step was saved: the same command starts anew"
        mode = self.trainer.resume_mode
        named = mode == "resume_path" and self.latest == self.named
        how = "" if mode == "auto" or named else " with trainer.resume_mode=auto"
        return f"the same command{how} goes on from {self.latest}"

    def make_root(self) -> None:
        """Makes and locks the folder. Raises: ValueError if it can't be, or another run's."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".writable").touch()
            (self.root / ".writable").unlink()
            lock = LOCKS.setdefault(self.root, (self.root / ".lock").open("a"))
        except OSError as error:
            text = f"trainer.default_local_dir={self.root} can't be written: {error}"
            raise ValueError(text) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run writes to trainer.default_local_dir={self.root}: wait for its end, "
                "or give this one a trainer.experiment_name of its own"
            ) from None
        except OSError as error:  # file systems without locks
            logger.info("%s can't be locked: %s", self.root, error)

    def save(self, state: TrainState, save_policy: Callable[[Path], Any]) -> Path:
        """Writes a checkpoint, whose `actor` is made by `save_policy`; until its last rename, the
        one before it is the latest. Raises: OSError if the disk is full, or the like."""
        final = self.root / f"global_step_{state.step}"
        aside, replaced = (self.root / f"{final.name}.{end}" for end in ("tmp", "old"))
        self._undo_swap()
        for rest in self.root.glob("global_step_*.*"):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            save_policy(aside / "actor")
            self._write_state(aside, state)
            seal(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if final.exists():  # never without a whole one: `find` takes the old one back
            os.replace(final, replaced)
        os.replace(aside, final)
        sync(self.root)
        pointer = self.root / f"{LATEST}.tmp"
        pointer.write_text(str(state.step))
        sync(pointer)
        os.replace(pointer, self.root / LATEST)
        sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(final)
        self.latest, self.saved_step = final, state.step
        return final

    def try_to_save(
        self,
        state: TrainState,
        batches: BatchesState,
        save_policy: Callable[[Path], Any],
        metrics_written: bool,
    ) -> None:
        """`save`, with these `batches`; if it can't, or not all metrics are written (no checkpoint
        is newer than they), that is logged and nothing else happens."""
        logger.info("writing a checkpoint of step %d", state.step)
        try:
            if not metrics_written:
                raise OSError("metrics.jsonl can't be written")
            self.save(replace(state, batches=batches), save_policy)
        except OSError as error:
            cause = getattr(error, "cause", error)  # of a worker's error, without its traceback
            text = "NO CHECKPOINT OF STEP %d: %s. The run goes on; the latest one is %s. "
            text += "Make room in %s before the next is due"
            logger.error(text, state.step, cause, self.latest, self.root)

    def _write_state(self, folder: Path, state: TrainState) -> None:
        batches, prefetched = state.batches, state.batches.prefetched
        write_samples(folder / CARRIED, [s for group in batches.carried for s in group])
        if prefetched is not None:
            write_samples(folder / PREFETCHED, prefetched.samples)
        saved = {f: getattr(state, f) for f in SCALARS}
        saved |= {"order": batches.order, "run_id": self.run_id, "config": asdict(self.config)}
        saved["prefetched_metrics"] = prefetched.metrics if prefetched else None
        (folder / "trainer.json").write_text(json.dumps(saved))

    def load(self, folder: Path, prompts: Sequence[Prompt]) -> TrainState:
        """The inverse of `save`, without the policy. `prompts`: those of training. Raises:
        ValueError if it belongs to another training that `trainer.resume_mode` doesn't allow."""
        saved = read_state(folder)
        if missing := {*SCALARS, "prefetched_metrics"} - saved.keys():
            raise ValueError(
                f"{folder} was written by another version, which did not save {min(missing)}: go "
                "on with that one, or start anew with trainer.resume_mode=disable"
            )
        same = self._compare_config(folder, saved["config"])
        carried = split_groups(read_samples(folder / CARRIED, prompts))
        batches = BatchesState(saved["order"], carried)
        if (found := saved["prefetched_metrics"]) is not None:
            batches.prefetched = TrainBatch(read_samples(folder / PREFETCHED, prompts), found)
        state = TrainState(batches, **{f: saved[f] for f in SCALARS})
        if not same:  # its validations can't be compared with what comes
            state.best = {}
        self.latest, self.saved_step = folder, state.step
        return state

    def _compare_config(self, folder: Path, saved: dict[str, Any]) -> bool:
        """Whether it is the same training, validated in the same way."""
        other, deliberate = changed_keys(saved, self.config)
        if other and self.trainer.resume_mode == "auto" and not self.trainer.val_only:
            lines = "".join(f"\n  {text}" for text in other)
            raise ValueError(
                f"{folder} belongs to another training:{lines}\nStart a new run with another "
                "trainer.experiment_name (or default_local_dir), or take the checkpoint over with "
                f"trainer.resume_mode=resume_path trainer.resume_from_path={folder}"
            )
        for text in other + deliberate:
            logger.warning("changed since the checkpoint was written: %s", text)
        return not other and same_validation(saved, self.config)

    def _prune(self, newest: Path) -> None:
        """Deletes what is more than `max_actor_ckpt_to_keep`, but never the one that was named."""
        if limit := self.trainer.max_actor_ckpt_to_keep:
            named = self.named and self.named.resolve()
            others = [path for path in self.saved().values() if path.resolve() != named]
            others.sort(key=lambda p: (p == newest, p.stat().st_mtime))
            for old in others[:-limit]:
                shutil.rmtree(old, ignore_errors=True)

    def saved(self) -> dict[int, Path]:
        """All checkpoints' folders by step, damaged ones included."""
        found = {p.name.removeprefix("global_step_"): p for p in self.root.glob("global_step_*")}
        return {int(step): path for step, path in found.items() if step.isdecimal()}

    def find(self) -> Path | None:
        """The checkpoint to resume from, as `trainer.resume_mode` says; None: start anew. `auto`
        takes the latest of this run that is whole.

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
        last, steps, problems = latest.read_text().strip(), self.saved(), []
        if last.isdecimal():
            steps.setdefault(int(last), self.root / f"global_step_{last}")
            for step, folder in sorted(steps.items(), reverse=True):
                if step > int(last):
                    continue
                if problem := damage(folder):
                    problems.append(f"{folder.name}: {problem}")
                elif self.run_id in (None, read_state(folder)["run_id"]):
                    if problems:
                        text = "resuming from %s, as what was written later is damaged (%s)"
                        logger.warning(text, folder, "; ".join(problems))
                    return folder
        raise ValueError(
            f"{latest} names step {last or 'none'}, but no checkpoint of this run is whole "
            f"({'; '.join(problems)}): bring one back, or start anew with "
            "trainer.resume_mode=disable"
        )

    def forget(self) -> None:
        """Leaves another run's checkpoints where they are, but nothing resumes from them."""
        (self.root / LATEST).unlink(missing_ok=True)

    def _undo_swap(self) -> None:
        """Takes a checkpoint back that was about to be replaced when the run was killed."""
        for old in self.root.glob("global_step_*.old"):
            if not old.with_suffix("").exists():
                os.replace(old, old.with_suffix(""))


def read_state(folder: Path) -> dict[str, Any]:
    """The scalars of a checkpoint's `TrainState`, and `config`: the resolved configuration."""
    state: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
    return state


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
