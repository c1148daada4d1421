"""Checkpoints. `global_step_N` holds `actor/` and, where there is a critic, `critic/` (as
`PolicyWorker.save` writes them), trainer.json (the rest of `TrainState`, and the resolved
configuration), the responses that wait for the next step (carried.feather, prefetched.feather), and
manifest.json (size and checksum of all these)."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from verl.config.schema import Config
from verl.config.validate import changed_keys
from verl.protocol import Prompt
from verl.trainer.ppo.batches import BatchesState, TrainBatch, split_groups
from verl.trainer.ppo.tracking import LATEST, make_folder, owner
from verl.utils.samples import read_samples, write_samples

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CARRIED, PREFETCHED = "carried.feather", "prefetched.feather"
CHECKED_BYTES = 2**20  # of each file's start and end are compared with the manifest


@dataclass(slots=True)
class TrainState:
    """All that a resumed run needs of the driver. Random generators are made anew in each step."""

    batches: BatchesState  # position in the data, responses that wait for the next step
    step: int = 0  # training steps made
    kl_coef: float = 0.0  # of the KL term in the reward
    # Optimizer steps up to now that were not finite, in a row, of `actor` and `critic`.
    skipped_by_model: dict[str, int] = field(default_factory=dict)
    validation_due: bool = False  # the one after `step` was postponed
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best validation so far
    # Lengths and squared gradient norms of responses that `alpha=auto` has measured, latest last.
    measured: list[list[float]] = field(default_factory=list)


SCALARS = [f.name for f in fields(TrainState) if f.name != "batches"]  # as they are in trainer.json


class CheckpointFolder:
    """The checkpoints in `root`, where this run writes; what is only validated stays as it is."""

    def __init__(self, config: Config) -> None:
        self.config, self.trainer = config, config.trainer
        self.home = Path(self.trainer.default_local_dir).expanduser().resolve()
        self.root = self.home / "val_only" if self.trainer.val_only else self.home
        self.named = Path(self.trainer.resume_from_path or "").expanduser().resolve()
        self.run_id = ""  # of the run that goes on; empty for a new one
        self.latest: Path | None = None  # the last that was written or, before that, resumed from
        self.saved_step = 0

    def save(self, state: TrainState, save_models: Callable[[Path], Any]) -> Path:
        """Writes a checkpoint, to which `save_models` adds `actor` and `critic`; until its last
        rename, the one before it is the latest. Raises: OSError if the disk is full, or the like.
        """
        final, aside = (self.root / f"global_step_{state.step}{end}" for end in ("", ".tmp"))
        for rest in self.root.glob("global_step_*.*"):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            save_models(aside)
            batches, prefetched = state.batches, state.batches.prefetched
            write_samples(aside / CARRIED, [s for group in batches.carried for s in group])
            if prefetched is not None:
                write_samples(aside / PREFETCHED, prefetched.samples)
            saved = {f: getattr(state, f) for f in SCALARS} | {
                "order": batches.order,
                "taken": batches.taken,
            }
            saved |= {"run_id": owner(self.root), "config": asdict(self.config)}
            saved["prefetched_metrics"] = prefetched.metrics if prefetched else None
            (aside / "trainer.json").write_text(json.dumps(saved))
            seal(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if final.exists():  # the run has gone back to an earlier one, which is whole
            shutil.rmtree(final)
        os.replace(aside, final)
        sync(self.root)
        pointer = self.root / f"{LATEST}.tmp"
        pointer.write_text(str(state.step))
        sync(pointer)
        os.replace(pointer, self.root / LATEST)
        sync(self.root)
        self._prune(final)
        self.latest, self.saved_step = final, state.step
        return final

    def try_to_save(
        self, state: TrainState, save_models: Callable[[Path], Any], metrics_written: bool
    ) -> None:
        """`save`, if all metrics are written; what prevents it is logged, and costs no more."""
        logger.info("writing a checkpoint of step %d", state.step)
        try:
            if not metrics_written:
                raise OSError("metrics.jsonl can't be written")
            self.save(state, save_models)
        except OSError as error:
            cause = getattr(error, "cause", error)  # of a worker's error, without its traceback
            text = "NO CHECKPOINT OF STEP %d: %s. The latest one is %s; make room in %s"
            logger.error(text, state.step, cause, self.latest, self.root)

    def load(self, folder: Path, prompts: Sequence[Prompt]) -> TrainState:
        """The inverse of `save`, but for the policy and, without training `prompts`, what waits for
        the next step. Raises: ValueError for another training, unless `resume_mode` allows it."""
        saved = read_state(folder)
        if missing := {*SCALARS, "prefetched_metrics", "run_id"} - saved.keys():
            problem = f"was written by another version, which did not save {min(missing)}"
            remedy = "go on with that one, or start anew with trainer.resume_mode=disable"
            raise ValueError(f"{folder} {problem}: {remedy}")
        if not self._compare_config(folder, saved["config"]):
            saved["best"] = {}  # its validations can't be compared with what comes
        batches = BatchesState(saved["order"], taken=saved.get("taken"))
        if prompts:
            batches.carried = split_groups(read_samples(folder / CARRIED, prompts))
            if (found := saved["prefetched_metrics"]) is not None:
                batches.prefetched = TrainBatch(read_samples(folder / PREFETCHED, prompts), found)
        state = TrainState(batches, **{f: saved[f] for f in SCALARS})
        if folder.parent == self.root:  # else it is where a new run begins
            self.run_id = saved["run_id"]
            if owner(self.root) not in (None, self.run_id):
                raise ValueError(f"{folder} is of another run than its folder: move it elsewhere")
        self.latest, self.saved_step = folder, state.step
        return state

    def _compare_config(self, folder: Path, saved: dict[str, Any]) -> bool:
        """Whether it is the same training, validated in the same way."""
        changed = changed_keys(saved, self.config)
        other = changed["error"]
        if other and self.trainer.resume_mode == "auto" and not self.trainer.val_only:
            lines = "".join(f"\n  {text}" for text in other)
            raise ValueError(
                f"{folder} belongs to another training:{lines}\nStart a new run with another "
                "trainer.experiment_name (or default_local_dir), or take the checkpoint over with "
                f"trainer.resume_mode=resume_path trainer.resume_from_path={folder}"
            )
        for text in other + changed["warn"]:
            logger.warning("changed since the checkpoint was written: %s", text)
        return not other and not changed["validation"]

    def _prune(self, newest: Path) -> None:
        """Deletes what is more than `max_actor_ckpt_to_keep`, but never the one that was named."""
        if limit := self.trainer.max_actor_ckpt_to_keep:
            others = [path for path in all_checkpoints(self.root).values() if path != self.named]
            others.sort(key=lambda p: (p == newest, p.stat().st_mtime))
            for old in others[:-limit]:
                shutil.rmtree(old, ignore_errors=True)

    def find(self) -> Path | None:
        """Locks the folder; the checkpoint to resume from. Raises: ValueError if none is whole."""
        make_folder(self.root)
        if self.trainer.resume_mode != "resume_path":
            return find_latest(self.home) if self.trainer.resume_mode == "auto" else None
        if problem := damage(self.named):
            text = f"trainer.resume_from_path={self.named}: there is no whole checkpoint"
            raise ValueError(f"{text} ({problem}); name another folder called global_step_N")
        return self.named


def all_checkpoints(root: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, damaged ones included, by their steps in rising order."""
    found = {path.name.removeprefix("global_step_"): path for path in root.glob("global_step_*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def find_latest(root: Path) -> Path | None:
    """The latest checkpoint of the run in `root` that is whole, with a warning if that isn't the
    one that `LATEST` names; None without such a file. Raises: ValueError if none is whole."""
    if not (root / LATEST).exists():
        return None
    text = (root / LATEST).read_text("utf-8-sig", "replace").strip()
    found, run_id, problems = all_checkpoints(root), owner(root), []
    if text.isdecimal() and len(text) < 10:  # later ones may be of a branch that was left
        found = {step: path for step, path in found.items() if step <= int(text)} or found
    if (named := root / f"global_step_{text}") not in found.values():
        problems.append(f"{LATEST} names {named.name[:40]!r}, which isn't there")
    for folder in reversed(found.values()):
        if problem := damage(folder):
            problems.append(f"{folder.name}: {problem}")
        elif run_id in (None, read_state(folder)["run_id"]):
            if problems:
                logger.warning("taking the checkpoint %s (%s)", folder, "; ".join(problems))
            return folder
    problem = f"no checkpoint of the run in {root} is whole ({'; '.join(problems)})"
    remedy = "bring one back, or start anew with trainer.resume_mode=disable"
    raise ValueError(f"{problem}: {remedy}")


def read_state(folder: Path) -> dict[str, Any]:
    """The scalars of a checkpoint's `TrainState`, and `config`: the resolved configuration."""
    return json.loads((folder / "trainer.json").read_text())


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
