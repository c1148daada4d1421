"""What the configuration schema is made of: sections, and keys with a range or a choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any


def one_of(default: str | None, *choices: str) -> Any:
    """A key whose value must be among `choices`."""
    return field(default=default, metadata={"choices": choices})


def number(
    default: float | int | None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A key whose value, if there is one, must lie in [low, high] and above `above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass
class Section:
    """A group of keys. Read-only once `lock` has been called on it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_locked"):
            raise AttributeError(f"the configuration is read-only after start: {name}")
        object.__setattr__(self, name, value)

    def lock(self) -> None:
        """Makes this section and all below it read-only."""
        for f in fields(self):
            child = getattr(self, f.name)
            if isinstance(child, Section):
                child.lock()
        object.__setattr__(self, "_locked", True)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
        """Yields (dotted key, value, field metadata) for every leaf key."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Section):
                yield from value.walk(f"{prefix}{f.name}.")
            else:
                yield prefix + f.name, value, f.metadata
