"""One step ahead: what is saved when the generation of the next step failed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.trainer.test_ray_trainer import make_trainer
from verl.trainer.ppo.ahead import BatchesAhead
from verl.trainer.ppo.batching import TrainBatches
from verl.utils.timer import Timer


def test_a_failed_generation_is_saved_as_not_begun_however_often(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Whoever saves takes parts of the state out of it."""
    trainer = make_trainer(tiny_model, tmp_path)

    def generate(*_: object) -> object:
        raise OSError("no engine")

    batches = TrainBatches(trainer.config, trainer.prompts, generate, trainer.rewards)
    ahead = BatchesAhead(batches, 9, lambda: None)
    before = copy.deepcopy(ahead.state())
    with pytest.raises(OSError, match="no engine"):
        ahead.next(1, Timer())
    for _ in range(2):
        state = ahead.state()
        assert state == before
        del state["carried"]
    ahead.close()
