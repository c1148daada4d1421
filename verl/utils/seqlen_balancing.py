"""Splitting sequences so that every part holds about the same number of tokens."""

import heapq
import math
from collections.abc import Sequence


def balanced_partitions(
    lengths: Sequence[int], parts: int, capacity: float = math.inf
) -> list[list[int]]:
    """Splits indices into `parts` ascending lists of nearly equal total length (longest first,
    always into the emptiest part). What would fill it beyond `capacity` opens one more. Example:
    ``balanced_partitions([5, 1, 4, 2], 2)`` is ``[[0, 1], [2, 3]]``."""
    result: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, part = heap[0]
        if total and total + lengths[i] > capacity:
            heapq.heappush(heap, (lengths[i], len(result)))
            result.append([i])
        else:
            heapq.heapreplace(heap, (total + lengths[i], part))
            result[part].append(i)
    return [sorted(part) for part in result]


def micro_batches(
    lengths: Sequence[int], size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Splits indices into non-empty micro-batches: of `size` sequences in the given order, or else
    few of about equal length with at most `max_tokens` (a longer sequence stands alone)."""
    if size is not None:
        return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
    assert max_tokens is not None
    parts = -(-sum(lengths) // max_tokens)
    return [part for part in balanced_partitions(lengths, parts, max_tokens) if part]
