"""Partitions of sequences over ranks and micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.protocol import Prompt, Sample
from verl.utils.seqlen_balancing import (
    balanced_partitions,
    micro_batches,
    micro_batches_of_prompts,
    partitions_of_prompts,
)

quick = settings(deadline=None, max_examples=100, derandomize=True)
token_counts = st.lists(st.integers(1, 200), max_size=40)


def totals(lengths: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in part) for part in parts]


def test_balanced_by_hand():
    assert balanced_partitions([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    # 9 | 7 | 6 5 would be 9, 7, 11: the 5 goes to the emptiest part, that of 6; the 1 to that of 7.
    assert balanced_partitions([5, 6, 7, 9, 1], 3) == [[3], [2, 4], [0, 1]]


def test_balanced_with_fewer_sequences_than_parts():
    assert sorted(balanced_partitions([4, 2], 4)) == [[], [], [0], [1]]
    assert balanced_partitions([], 2) == [[], []]


@quick
@given(token_counts, st.integers(1, 9))
def test_balanced_uses_every_sequence_once_and_is_nearly_even(lengths, parts):
    result = balanced_partitions(lengths, parts)
    assert len(result) == parts
    assert sorted(i for part in result for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in result)
    sums = totals(lengths, result)
    assert max(sums) - min(sums) <= max(lengths, default=0)
    assert balanced_partitions(lengths, parts) == result


def test_micro_batches_by_count():
    assert micro_batches([9, 9, 9, 9, 9], size=2) == [[0, 1], [2, 3], [4]]
    assert micro_batches([9, 9], size=5, max_tokens=1) == [[0, 1]]
    assert micro_batches([], size=2) == []


def test_micro_batches_by_tokens():
    assert micro_batches([5, 1, 4, 2], max_tokens=6) == [[0, 1], [2, 3]]
    assert micro_batches([3, 3, 3], max_tokens=100) == [[0, 1, 2]]
    assert micro_batches([], max_tokens=10) == []


def test_micro_batches_where_one_sequence_is_over_the_budget():
    # 12 stands alone; two of 6 would be 12 tokens too, more than the budget.
    result = micro_batches([12, 6, 6, 6], max_tokens=10)
    assert sorted(result) == [[0], [1], [2], [3]]
    result = micro_batches([100, 4, 3, 2], max_tokens=5)
    assert [0] in result


def test_micro_batches_that_hold_one_sequence_each_are_found_at_once():
    # Two of 9 are over the budget of 16: as many parts as sequences, not sum / budget.
    lengths = [9] * 20_000
    assert micro_batches(lengths, max_tokens=16) == [[i] for i in range(20_000)]


def test_a_part_that_is_full_opens_another():
    # 5 | 4, then 4 would make 8 of at most 7: a third part; 3 joins a 4, 2 the other.
    assert balanced_partitions([5, 4, 4, 3, 2], 2, 7) == [[0], [1, 3], [2, 4]]


@quick
@given(token_counts, st.integers(1, 150))
def test_micro_batches_keep_the_budget(lengths, max_tokens):
    result = micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(i for part in result for i in part) == list(range(len(lengths)))
    assert all(result)
    for part, total in zip(result, totals(lengths, result), strict=True):
        assert total <= max_tokens or len(part) == 1
    if max(lengths, default=0) <= max_tokens:
        # Longest-first needs at most twice as many as could do: with so many, every sequence of
        # more than half a budget finds an empty one, and every shorter one half a budget.
        assert len(result) <= 2 * -(-sum(lengths) // max_tokens)


def test_a_budget_or_a_size_is_needed():
    with pytest.raises(AssertionError):
        micro_batches([1, 2])


def sharing(*responses: tuple[int, int, int]) -> list[Sample]:
    """Of (prompt, its length, length)."""
    return [
        Sample(Prompt(i, np.full(p, i), "", None), i, np.zeros(r, np.int64), "stop")
        for i, p, r in responses
    ]


def computed(samples: list[Sample], part: list[int]) -> int:
    """Tokens of a part that has each prompt once."""
    prompts = {(s := samples[i]).prompt.index: len(s.prompt.token_ids) for i in part}
    return sum(prompts.values()) + sum(len(samples[i].response_ids) for i in part)


def test_responses_of_a_prompt_together_by_hand():
    samples = sharing((0, 9, 2), (1, 8, 4), (0, 9, 3), (1, 8, 2), (2, 3, 4), (0, 9, 1))
    assert micro_batches_of_prompts(samples, 18) == [[0, 2, 5], [1, 3], [4]]
    assert micro_batches_of_prompts(samples, 25) == [[0, 2, 5], [1, 3, 4]]
    assert micro_batches_of_prompts(samples, 15) == [
        [0],
        [2, 5],
        [1, 3],
        [4],
    ]  # 9 + 2 + 9 / 8 + 3 > 15
    assert partitions_of_prompts(samples, 2) == [[0, 2, 5], [1, 3, 4]]  # 15 and 21
    # On two ranks, 12 and 12 are less than 21 and 3.
    samples = sharing((0, 3, 9), (0, 3, 9), (1, 1, 2))
    assert max(computed(samples, p) for p in partitions_of_prompts(samples, 2)) == 15
    samples = sharing((0, 3, 9), (0, 3, 9))
    assert partitions_of_prompts(samples, 2) == [[0], [1]]
    assert partitions_of_prompts(samples, 1) == [[0, 1]]


@quick
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=40),
    st.integers(1, 9),
    st.integers(1, 300),
)
def test_prompts_are_never_worse_than_samples_alone(found, parts, most):
    samples = sharing(*((prompt, 1 + 13 * prompt, length) for prompt, length in found))
    lengths = [s.num_tokens for s in samples]
    together, apart = partitions_of_prompts(samples, parts), balanced_partitions(lengths, parts)
    assert len(together) == parts
    loads = [max(computed(samples, part) for part in p) for p in (together, apart)]
    assert loads[0] <= loads[1]
    batches = micro_batches_of_prompts(samples, most) if samples else []
    for result in (together, batches):
        assert sorted(i for part in result for i in part) == [*range(len(samples))]
    assert all(len(part) == 1 or 0 < computed(samples, part) <= most for part in batches)
