"""A decoding step as one graph of torch.compile, which joins what is between its products."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from verl.models.kv_cache import RaggedCache, example, in_use, next_logits
from verl.utils.device import compiler_available

TOLERANCES = {4: 1e-3, 2: 5e-2}
"""Bytes of a number → by how much of the largest logit the graph's logits may differ."""


def of_a_call(guards: Sequence[Any]) -> list[bool]:
    """Which of torch's checks that a graph fits a call are made: those of the call's own tensors
    and sizes. A thousand others, of the model's attributes, would take a twentieth of the time."""
    return [
        guard.guard_type == "SHAPE_ENV" or guard.name in ("ids", "mask", "positions")
        for guard in guards
    ]


def refusal(why: str) -> ValueError:
    """For a model whose decoding step isn't compiled."""
    key = "actor_rollout_ref.rollout.enforce_eager"
    problem = f"{key}=False, but the decoding step can't be compiled ({why})"
    return ValueError(f"{problem}; set it to True to run without")


class PassingCache(Cache):
    """Stands in a graph for a cache of `length` columns: hands new keys and values on to the
    operation of the attention, which has the real one (`verl.models.kv_cache.attend`)."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """See `Cache.update`."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See `Cache.get_seq_length`."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """See `Cache.get_mask_sizes`."""
        return self.length + query_length, 0


def graph(model: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """What is compiled (see `next_logits`)."""
    return next_logits(model, ids, mask, positions, PassingCache(mask.shape[1] - 1))


class CompiledStep:
    """A causal model's pass over one new token a row, for any number of rows and columns."""

    def __init__(self, model: Any, max_parts: int) -> None:
        """Compiles it, and compares it with the model. Raises: ValueError if there is no compiler,
        or the model can't be compiled."""
        if model.device.type == "cpu" and not compiler_available():
            raise refusal("no C++ compiler: apt-get install g++, or set CXX")
        if max_parts == 1:
            raise refusal("its attention is not transformers' sdpa of the cache")
        self.model = model
        # torch keeps graphs by code object: each model needs its own, as no check tells them apart.
        own = FunctionType(graph.__code__.replace(), globals())
        options: dict[str, Any] = {"guard_filter_fn": of_a_call}
        self.graph = torch.compile(own, dynamic=True, fullgraph=True, options=options)
        try:
            self._compare()
        except Exception as error:
            text, *_ = str(error).strip().splitlines() or [type(error).__name__]
            raise refusal(text) from error

    def __call__(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: RaggedCache
    ) -> Tensor:
        """The next token's logits, [B, V]; see `verl.rollout.hf.Batch.read_last`."""
        if mask is None:
            columns = cache.get_seq_length() + 1
            mask = torch.ones(len(ids), columns, dtype=torch.bool, device=ids.device)
        inputs, rows = [ids, mask, positions], len(ids)
        if rows == 1:  # for which torch.compile would make a graph of its own
            inputs = [x.repeat(2, 1) for x in inputs]
        in_use.cache = cache
        try:
            return self.graph(self.model, *inputs)[:rows]
        finally:
            in_use.cache = None

    @torch.inference_mode()
    def _compare(self) -> None:
        self._compare_rows([2, 1], max_parts=2)
        with torch.compiler.set_stance("fail_on_recompile"):  # one graph is for all sizes
            self._compare_rows([4, 1, 2], max_parts=2)  # two rows are one part, and one is padded
            self._compare_rows([3], max_parts=1)

    def _compare_rows(self, lengths: list[int], max_parts: int) -> None:
        (cache, inputs), (other, _) = (example(self.model, max_parts, lengths) for _ in range(2))
        expected = next_logits(self.model, *inputs, cache)
        found = self(*inputs, other)
        allowed = TOLERANCES[expected.itemsize] * expected.abs().max()
        if not (difference := (found - expected).abs().max()) <= allowed:  # nor not a number
            raise ArithmeticError(f"its logits differ by {difference:.2g}")
