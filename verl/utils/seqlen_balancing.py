"""Splitting sequences so that every part holds about the same number of tokens."""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from verl.protocol import Sample, by_prompt

STEPS = 17  # sizes that are tried
REPEATED = 1 / 8
"""Of what a token takes, that by which keys and values of a layer grow when they are repeated."""


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


def micro_batches_of_prompts(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """`micro_batches` of samples whose prompts are computed once in each of them: few, with the
    responses of a prompt together. For every further response a prompt counts `REPEATED`."""
    total, groups = _computed(samples), by_prompt(samples)
    sizes = np.linspace(total / -(-total // max_tokens), max_tokens, STEPS).tolist()
    parts = (_fill(samples, groups, most, REPEATED) for most in sizes)
    return min(parts, key=len)  # of the fewest the most even


def partitions_of_prompts(samples: Sequence[Sample], parts: int) -> list[list[int]]:
    """`balanced_partitions` of samples whose prompts are computed once in each part: with the
    responses of a prompt together, if the largest part has less to compute that way."""
    apart = balanced_partitions([s.num_tokens for s in samples], parts)
    groups = by_prompt(samples)
    if parts == 1 or len(groups) == len(samples):
        return apart
    largest = max(_computed([samples[i] for i in part]) for part in apart)
    for most in np.linspace(_computed(samples) / parts, largest, STEPS)[:-1].tolist():
        together = _fill(samples, groups, most)
        if len(together) <= parts:
            return together + [[] for _ in range(parts - len(together))]
    return apart


def _computed(samples: Sequence[Sample]) -> int:
    """Tokens of a part that has each prompt once."""
    prompts = {s.prompt.token_ids.tobytes(): len(s.prompt.token_ids) for s in samples}
    return sum(prompts.values()) + sum(len(s.response_ids) for s in samples)


def _fill(
    samples: Sequence[Sample], groups: list[list[int]], most: float, repeated: float = 0.0
) -> list[list[int]]:
    """Parts with at most so many tokens, one after the other, prompt by prompt (`groups`);
    `repeated`: what counts of a prompt that is there."""
    parts: list[list[int]] = []
    filled = math.inf
    for group in groups:
        share, prompt = 1.0, len(samples[group[0]].prompt.token_ids)
        for i in group:
            response = len(samples[i].response_ids)
            if filled + share * prompt + response > most:
                parts.append([])
                filled, share = 0.0, 1.0
            filled += share * prompt + response
            parts[-1].append(i)
            share = repeated
    return parts
