"""What a checkpoint's metadata may build."""

import io
import pickle
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp

from verl.utils.safe_load import SafePlanner, SafeReader, Unpickler


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the latter in Python 3.13
def test_the_path_that_it_was_written_to(module: str) -> None:
    text = f"c{module}\nPosixPath\n(S'/runs'\nS'one'\ntR.".encode()
    assert Unpickler(io.BytesIO(text)).load() == PurePosixPath("/runs/one")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "Enum"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("builtins", "__class__"),
    ],
)
def test_nothing_that_runs(module: str, name: str) -> None:
    # Protocol 4, whose names may have dots: two texts, then STACK_GLOBAL.
    names = b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name))
    for text in (f"c{module}\n{name}\n.".encode(), b"\x80\x04" + names + b"\x93."):
        with pytest.raises(pickle.UnpicklingError, match="is not what a checkpoint is made of"):
            Unpickler(io.BytesIO(text)).load()


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = {
        "weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"lr": 0.5, "betas": [0.9, 0.95], "name": "adamw", "step": torch.tensor(3)},
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    empty = {
        "weights": {name: torch.zeros_like(w) for name, w in state["weights"].items()},
        "optimizer": {"lr": 0.0, "betas": [0.0, 0.0], "name": "", "step": torch.tensor(0)},
    }
    dcp.load(empty, storage_reader=SafeReader(tmp_path), planner=SafePlanner(), no_dist=True)
    for name, weight in state["weights"].items():
        torch.testing.assert_close(empty["weights"][name], weight)
    assert empty["optimizer"] == state["optimizer"]
