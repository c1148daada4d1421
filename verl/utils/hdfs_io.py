"""What data scripts of verl's write with: files of this machine (or of a file system it mounts)."""

import os
import shutil
from typing import Any


def local(path: str | os.PathLike[str]) -> str:
    """The path. Raises: ValueError for one of HDFS."""
    if (text := os.fspath(path)).startswith("hdfs:"):
        remedy = "write to a folder, and copy it there with `hdfs dfs -put`"
        raise ValueError(f"{text}: HDFS is neither read nor written: {remedy}")
    return text


def exists(path: str, **_: Any) -> bool:
    """Whether there is such a file or folder. Raises: as `local`."""
    return os.path.exists(local(path))


def makedirs(name: str, mode: int = 0o777, exist_ok: bool = False, **_: Any) -> None:
    """`os.makedirs`. Raises: as that and `local`."""
    os.makedirs(local(name), mode=mode, exist_ok=exist_ok)


def copy(src: str, dst: str, **kwargs: Any) -> str:
    """Copies a file, or a folder, into one that may be there; where it is then. Raises: OSError; as
    `local`."""
    if os.path.isdir(local(src)):
        return str(shutil.copytree(src, local(dst), **{"dirs_exist_ok": True} | kwargs))
    return str(shutil.copy(src, local(dst), **kwargs))
