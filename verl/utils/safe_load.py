"""Reads torch.distributed.checkpoint without executing what a file says.

Its own reader unpickles `.metadata`, and its planner every value that is no tensor.
"""

from __future__ import annotations

import io
import pickle
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    "BytesStorageMetadata": METADATA,
    "ChunkStorageMetadata": METADATA,
    "Metadata": METADATA,
    "MetadataIndex": METADATA,
    "StorageMeta": METADATA,
    "TensorProperties": METADATA,
    "TensorStorageMetadata": METADATA,
    "_MEM_FORMAT_ENCODING": METADATA,
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
}
"""Name → module of all that `.metadata` may hold, besides torch's dtypes and a path."""


class Unpickler(pickle.Unpickler):
    """Refuses whatever is not in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises: pickle.UnpicklingError for another class or function."""
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):  # Python 3.13's
            return PurePosixPath
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or ALLOWED.get(name) == module:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not what a checkpoint is made of")


class SafeReader(FileSystemReader):
    """Builds nothing but what a checkpoint's metadata is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises: pickle.UnpicklingError for anything else in the file."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Numbers, texts and lists of them are read as weights are: with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Stores one value that is no tensor."""
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
