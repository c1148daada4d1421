"""What a checkpoint's metadata may build."""

from __future__ import annotations

import io
import pickle
from pathlib import PurePosixPath

import pytest

from verl.utils.safe_load import Unpickler


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the latter in Python 3.13
def test_the_path_that_it_was_written_to(module: str) -> None:
    text = f"c{module}\nPosixPath\n(S'/runs'\nS'one'\ntR.".encode()
    assert Unpickler(io.BytesIO(text)).load() == PurePosixPath("/runs/one")


def test_nothing_that_runs() -> None:
    for text in (b"cos\nsystem\n(S'true'\ntR.", b"ctorch\nload\n(S'x'\ntR."):
        with pytest.raises(pickle.UnpicklingError, match="is not what a checkpoint is made of"):
            Unpickler(io.BytesIO(text)).load()
