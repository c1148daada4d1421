"""A KV cache of rows that differ in length, written in place, and an attention that reads it so."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from verl.models.packing import explicit_attention

DECODE_ATTENTION = "decode"  # transformers' name of `decode_attention`
MAX_PARTS = 8  # each costs a call of the attention
SPARE = 32  # columns that a new buffer has to spare


@dataclass(slots=True)
class Part:
    """Keys and values of neighbouring rows of the batch. All end in its last column; shorter rows
    have padding in front."""

    buffers: list[Tensor]  # keys and values, [B, heads, capacity, D] each
    used: int  # columns that hold something
    limit: int  # columns that its rows will need at most

    def __len__(self) -> int:
        return len(self.buffers[0])

    @property
    def views(self) -> list[Tensor]:
        """Keys and values, [B, heads, used, D] each."""
        return [buffer[:, :, : self.used] for buffer in self.buffers]

    def append(self, new: Sequence[Tensor]) -> None:
        """More columns of keys and values, [B, heads, new, D] each."""
        start, self.used = self.used, self.used + new[0].shape[2]
        if self.used > self.buffers[0].shape[2]:
            old = [buffer[:, :, :start] for buffer in self.buffers]
            self.buffers = [self._new_buffer(view, len(view)) for view in old]
            for buffer, view in zip(self.buffers, old, strict=True):
                buffer[:, :, :start] = view
        for buffer, values in zip(self.buffers, new, strict=True):
            buffer[:, :, start : self.used] = values

    def select(self, rows: Tensor, width: int) -> None:
        """Keeps these rows, in this order, which may come several times, and the last columns."""
        old = [view[:, :, self.used - width :] for view in self.views]
        self.limit -= self.used - width
        self.used = width
        self.buffers = [self._new_buffer(view, len(rows)) for view in old]
        for buffer, view in zip(self.buffers, old, strict=True):
            torch.index_select(view, 0, rows, out=buffer[:, :, :width])

    def merge(self, other: Self) -> None:
        """Appends the other part's rows; the shorter ones get columns of zeros in front."""
        mine, theirs, rows = self.views, other.views, len(self)
        width = max(self.used, other.used)
        self.limit = width + max(part.limit - part.used for part in (self, other))
        begin, self.used = width - self.used, width
        self.buffers = [self._new_buffer(view, rows + len(other)).zero_() for view in mine]
        for buffer, *views in zip(self.buffers, mine, theirs, strict=True):
            buffer[:rows, :, begin:width] = views[0]
            buffer[rows:, :, width - other.used : width] = views[1]

    def _new_buffer(self, like: Tensor, rows: int) -> Tensor:
        """Without content, for `used` columns and more."""
        more = max(SPARE, min(self.limit - self.used, self.used // 2))
        return like.new_empty(rows, like.shape[1], self.used + more, like.shape[3])


class RaggedLayer(DynamicLayer):
    """One layer's keys and values, for up to `limit` tokens a row. Rows that begin together are a
    part of the batch, with columns of its own; there are at most `max_parts`."""

    def __init__(self, limit: int, max_parts: int) -> None:
        super().__init__()
        self.limit, self.max_parts = limit, max_parts
        self.parts: list[Part] = []

    def get_seq_length(self) -> int:
        """Columns of the longest part."""
        return max((part.used for part in self.parts), default=0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Appends [B, heads, new, D], and returns all keys and all values: views
        [B, heads, length, D]; where the batch has several parts, a tuple of them each."""
        if not self.parts:
            self.lazy_initialization(key_states, value_states)
            self.parts = [Part([key_states[:, :, :0], value_states[:, :, :0]], 0, self.limit)]
        sizes = [len(part) for part in self.parts]
        new = zip(*(states.split(sizes) for states in (key_states, value_states)), strict=True)
        for part, states in zip(self.parts, new, strict=True):
            part.append(states)
        keys, values = zip(*(part.views for part in self.parts), strict=True)
        return (keys[0], values[0]) if len(keys) == 1 else (keys, values)

    def join(self, other: Self) -> None:
        """Appends another layer's rows. If these are too many parts, those neighbours become one
        that need the least padding."""
        self.parts += other.parts
        while len(self.parts) > self.max_parts:
            at = min(range(len(self.parts) - 1), key=self._padding)
            self.parts[at].merge(self.parts.pop(at + 1))

    def _padding(self, at: int) -> tuple[int, int]:
        """Columns times rows that two neighbouring parts would have more if they were one; rows."""
        one, other = self.parts[at : at + 2]
        shorter = min(one, other, key=lambda part: part.used)
        return abs(one.used - other.used) * len(shorter), len(one) + len(other)


class RaggedCache(Cache):
    """Keys and values of all layers (see `RaggedLayer`)."""

    layers: list[Any]  # of `RaggedLayer`

    def __init__(self, limit: int, max_parts: int) -> None:
        layer: Any = partial(RaggedLayer, limit, max_parts)
        super().__init__(layer_class_to_replicate=layer)

    def join(self, other: Self) -> None:
        """Appends another cache's rows."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs)

    def keep(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Only these rows of the batch, in their order, which have so many tokens each."""
        parts: list[Part] = self.layers[0].parts
        ends = list(accumulate(len(part) for part in parts))
        chosen: list[list[tuple[int, int]]] = [[] for _ in parts]  # rows of each, and their tokens
        for row, number in zip(rows, tokens, strict=True):
            at = bisect_right(ends, row)
            chosen[at].append((row - ends[at] + len(parts[at]), number))
        device = parts[0].buffers[0].device
        changes = {
            i: (torch.tensor([row for row, _ in own], device=device), max(n for _, n in own))
            for i, own in enumerate(chosen)
            if 0 < len(own) < len(parts[i])
        }
        for layer in self.layers:
            for i, change in changes.items():
                layer.parts[i].select(*change)
            layer.parts = [part for part, own in zip(layer.parts, chosen, strict=True) if own]

    def repeat(self, rows: Tensor) -> None:
        """These rows, in this order, of a batch of one part; each may come several times."""
        for layer in self.layers:
            layer.parts[0].select(rows, layer.parts[0].used)


@torch.inference_mode()
def max_parts(model: Any) -> int:
    """How many parts a model's cache may have: one, unless all its layers give keys and values to
    `decode_attention` as the cache has them. That is tried, with a row of two tokens and one of
    one."""
    if model.config._attn_implementation != DECODE_ATTENTION:
        return 1
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    cache, other = (RaggedCache(3, 2) for _ in range(2))
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    model(input_ids=ids[:, :1], past_key_values=other, use_cache=True)
    cache.join(other)
    inputs: dict[str, Tensor] = {
        "input_ids": ids.T,
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]], device=model.device),
        "position_ids": torch.tensor([[2], [1]], device=model.device),
    }
    try:
        model(**inputs, past_key_values=cache, use_cache=True)
    except (AttributeError, TypeError):  # it takes what isn't one tensor for one
        return 1
    return MAX_PARTS


def mask_of_scores(*args: Any, dtype: torch.dtype = torch.float32, **kw: Any) -> Tensor | None:
    """transformers' mask for `sdpa`; for one query a row as what is added to its scores, which
    `sdpa` would make of it in each layer anew."""
    mask = sdpa_mask(*args, **kw)
    if mask is None or mask.shape[-2] > 1:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def decode_attention(
    module: Any,
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    **kw: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, [B, heads, T, D] → [B, T, heads, D], with sinks and caps of scores, and
    with several parts of the batch; for T = 1 without copies of the cache: query heads that share a
    key-value head are so many queries of that head."""
    if not isinstance(key, Tensor):
        return _of_parts(module, query, key, value, attention_mask, **kw), None
    assert isinstance(value, Tensor)
    if kw.get("s_aux") is not None or kw.get("softcap") is not None:
        output = explicit_attention(query, key, value, attention_mask, **kw)
        return output.transpose(1, 2).contiguous(), None
    per_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.shape[2] > 1 or per_head or kw.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)
    heads = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    scale = kw.get("scaling")
    output = F.scaled_dot_product_attention(heads, key, value, attention_mask, scale=scale)
    return output.reshape(len(query), 1, query.shape[1], value.shape[-1]), None


def _of_parts(
    module: Any, query: Tensor, keys: Any, values: Any, mask: Tensor | None, **kw: Any
) -> Tensor:
    """Of each part: its rows see what the last columns of their mask say."""
    sizes, widths = ([part.shape[i] for part in keys] for i in (0, 2))
    masks = [None] * len(keys) if mask is None else mask.expand(len(query), -1, -1, -1).split(sizes)
    bias, outputs = kw.pop("position_bias", None), []
    for q, k, v, m, width in zip(query.split(sizes), keys, values, masks, widths, strict=True):
        last = None if m is None else m[..., -width:]
        own = {} if bias is None else {"position_bias": bias[..., -width:]}
        outputs.append(decode_attention(module, q, k, v, last, **kw, **own)[0])
    return torch.cat(outputs)


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, mask_of_scores)
