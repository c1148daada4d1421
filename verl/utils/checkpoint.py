"""Checkpoints: written aside, renamed when complete, found again.

default_local_dir/
  global_step_20/actor/          parameters, optimizer, schedule (torch.distributed.checkpoint)
  global_step_20/trainer.json    the driver's state
  global_step_20/drawn.parquet   with trainer.async_rollout, the batch of the next step
  global_step_20/carried.parquet responses that DAPO's filter kept for the next step
  latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.trainer.config.schema import TrainerConfig

LATEST = "latest_checkpointed_iteration.txt"


class CheckpointFolder:
    """The checkpoints below `trainer.default_local_dir`."""

    def __init__(self, trainer: TrainerConfig) -> None:
        self.trainer = trainer
        self.root = Path(trainer.default_local_dir).expanduser().absolute()

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], Any]) -> Path:
        """Writes a checkpoint of `step`. Until the last rename, the one before it is the latest.

        `state`: the driver's, JSON-able. `write` adds everything else to the folder it is given.
        """
        final = self.root / f"global_step_{step}"
        aside = self.root / f"{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        (aside / "trainer.json").write_text(json.dumps(state | {"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        latest = self.root / f"{LATEST}.tmp"
        latest.write_text(str(step))
        os.replace(latest, self.root / LATEST)
        if limit := self.trainer.max_actor_ckpt_to_keep:
            found = [p for p in self.root.iterdir() if re.fullmatch(r"global_step_\d+", p.name)]
            found.sort(key=lambda p: (p == final, p.stat().st_mtime))
            for old in found[:-limit]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def find(self) -> Path | None:
        """The checkpoint to resume from, as `trainer.resume_mode` says; None: start anew.

        Raises: ValueError if a named checkpoint isn't one.
        """
        if self.trainer.resume_mode == "disable":
            return None
        latest = self.root / LATEST
        if self.trainer.resume_mode == "resume_path":
            folder = Path(self.trainer.resume_from_path or "").expanduser().absolute()
            problem = f"trainer.resume_from_path={folder}: there is no checkpoint; name a folder "
            problem += "called global_step_N"
        elif latest.is_file():
            folder = self.root / f"global_step_{latest.read_text().strip()}"
            problem = f"{latest} names {folder.name}, which is not there: correct the number in "
            problem += "it, or start anew with trainer.resume_mode=disable"
        else:
            return None
        if not (folder / "trainer.json").is_file():
            raise ValueError(problem)
        return folder

    def forget(self) -> None:
        """What a new run in a used folder does: its predecessor's checkpoints stay, but nothing
        resumes from them by itself."""
        (self.root / LATEST).unlink(missing_ok=True)

    @staticmethod
    def read_state(folder: Path) -> dict[str, Any]:
        """The driver's state of a checkpoint, with `step`."""
        return json.loads((folder / "trainer.json").read_text())
