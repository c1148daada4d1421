"""What `RayPPOTrainer` saves, and when; what it takes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl.protocol import Prompt
from verl.rewards.errors import RewardError
from verl.trainer.config.resume import changed_keys, same_validation
from verl.trainer.config.schema import Config
from verl.trainer.ppo.ahead import BatchesAhead
from verl.trainer.ppo.batching import TrainBatches, split_groups
from verl.trainer.ppo.core_algos import KLController
from verl.trainer.ppo.guard import SkippedSteps
from verl.utils.checkpoint import CheckpointFolder
from verl.utils.samples import read_samples, write_samples
from verl.utils.tracking import RUN_ID, Tracking
from verl.workers.group import WorkerGroup

logger = logging.getLogger(__name__)

CARRIED = "carried.parquet"  # in a checkpoint: what the filter kept for the next step
DRAWN = "drawn.parquet"  # with async_rollout: the next step's batch


class Resumable:
    """A run that goes on from its checkpoints as if nothing had happened. Random numbers need no
    state: each is drawn from a generator seeded with the configuration's seed and the step."""

    config: Config
    checkpoints: CheckpointFolder
    prompts: list[Prompt]
    batches: TrainBatches | BatchesAhead
    actor: WorkerGroup
    kl_controller: KLController
    skipped: SkippedSteps
    step: int
    saved_step: int
    latest: Path | None
    """The last checkpoint that was written or, before that, resumed from."""
    tracking: Tracking
    validation_missing: bool
    best: dict[str, float]
    """Metrics of the best validation so far."""

    @property
    def run_id(self) -> str | None:
        """What tells this run from another in the same folder; wandb's id, too."""
        path = self.checkpoints.root / RUN_ID
        return path.read_text().strip() if path.is_file() else None

    @property
    def how_to_resume(self) -> str:
        """What to tell users when the run ends too early."""
        if self.latest is None:
            return "no step was saved: the same command starts anew"
        mode = self.config.trainer.resume_mode
        named = mode == "resume_path" and self.latest == self.checkpoints.named
        how = "" if mode == "auto" or named else " with trainer.resume_mode=auto"
        return f"the same command{how} goes on from {self.latest}"

    def save_checkpoint(self) -> None:
        """Writes what a resumed run needs to go on as if nothing had happened. If it can't be
        written, an error is logged, and the run goes on."""
        state = self.batches.state()
        carried = [sample for group in state.pop("carried") for sample in group]
        drawn = state.pop("drawn", [])
        state |= {
            "kl_coef": self.kl_controller.value,
            "validation_missing": self.validation_missing,
            "best": self.best,
            "skipped_in_a_row": self.skipped.in_a_row,
            "run_id": self.run_id,
            "config": asdict(self.config),
        }

        def write(folder: Path) -> None:
            self.actor.call("save", str(folder / "actor"))
            write_samples(folder / CARRIED, carried)
            write_samples(folder / DRAWN, drawn)

        try:
            if not self.tracking.flush():  # a checkpoint is never newer than the metrics
                raise OSError(f"{self.tracking.file.name} can't be written")
            self.latest = self.checkpoints.save(self.step, state, write)
            self.saved_step = self.step
        except OSError as error:
            logger.error(
                "NO CHECKPOINT OF STEP %d: %s. The run goes on; the latest one is %s. Make room in "
                "%s before the next is due",
                self.step,
                getattr(error, "cause", error),  # of a worker's error, without its traceback
                self.latest,
                self.checkpoints.root,
            )

    @contextmanager
    def saved_on_error(self, validation_missing: bool = False) -> Iterator[None]:
        """For what fails while the policy is that of `step`, such as a reward: writes a checkpoint
        of what was before, so that the error costs no step that was complete."""
        try:
            yield
        except (RewardError, ValueError):
            if self.step not in (0, self.saved_step):  # a run without a step starts anew
                logger.error("writing a checkpoint of step %d, then stopping", self.step)
                self.validation_missing = validation_missing
                self.save_checkpoint()
            raise

    def load_state(self, folder: Path) -> None:
        """Takes the driver's part of a checkpoint back.

        Raises: ValueError if it belongs to another training, unless `trainer.resume_mode` says to
        take it all the same.
        """
        state = self.checkpoints.read_state(folder)
        same = self._compare_config(folder, state["config"])
        self.step = self.saved_step = state["step"]
        state["carried"] = split_groups(read_samples(folder / CARRIED, self.prompts))
        state["drawn"] = read_samples(folder / DRAWN, self.prompts)
        self.batches.load(state)
        self.validation_missing = state["validation_missing"]
        self.kl_controller.value = state["kl_coef"]
        self.skipped.in_a_row = state["skipped_in_a_row"]
        if same:  # else its validations can't be compared with what comes
            self.best = state["best"]

    def _compare_config(self, folder: Path, saved: dict[str, Any]) -> bool:
        """Whether it is the same training, validated in the same way."""
        trainer = self.config.trainer
        other, deliberate = changed_keys(saved, self.config)
        if other and trainer.resume_mode == "auto" and not trainer.val_only:
            lines = "".join(f"\n  {text}" for text in other)
            raise ValueError(
                f"{folder} belongs to another training:{lines}\nStart a new run with another "
                "trainer.experiment_name (or default_local_dir), or take the checkpoint over with "
                f"trainer.resume_mode=resume_path trainer.resume_from_path={folder}"
            )
        for text in other + deliberate:
            logger.warning("changed since the checkpoint was written: %s", text)
        return not other and same_validation(saved, self.config)
