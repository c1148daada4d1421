"""Reads torch.distributed.checkpoint, which unpickles what is no tensor, without executing it."""

import io
import pickle
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import ReadItem

MODULES = {m.__name__: m for m in (torch, torch.serialization, filesystem, metadata)}
OTHERS = (torch.Size, torch.serialization._get_layout, filesystem._StorageInfo)


class Unpickler(pickle.Unpickler):
    """Builds what `.metadata` is made of: the data classes of its module, dtypes, and `OTHERS`."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises: pickle.UnpicklingError for another class or function."""
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):  # Python 3.13's
            return PurePosixPath
        found = getattr(MODULES.get(module), name, None)  # unlike pickle's own, it follows no dots
        data = isinstance(found, type) and found.__module__ == metadata.__name__
        if data or isinstance(found, torch.dtype) or found in OTHERS:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not what a checkpoint is made of")


class SafeReader(FileSystemReader):
    """Reads `.metadata` with `Unpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Raises: pickle.UnpicklingError for anything else in the file."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            found: metadata.Metadata = Unpickler(file).load()
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class SafePlanner(DefaultLoadPlanner):
    """Numbers, texts and lists of them are read as weights are: with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Stores one value that is no tensor."""
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))
