"""A KV cache of rows that differ in length, written in place, and an attention that reads it so."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
MOST_PARTS = 8  # each costs a call of the attention
SPARE = 32  # columns that a buffer has at least to spare when it is made


@dataclass(slots=True)
class Part:
    """Keys and values of neighbouring rows of the batch that have `used` columns, the last ones of
    those that the longest row of all has."""

    buffers: list[Tensor]  # keys and values, [B, heads, capacity, D] each
    used: int
    limit: int  # columns that it may get

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
            self.buffers = [self._room(buffer[:, :, :start], len(self)) for buffer in self.buffers]
        for buffer, values in zip(self.buffers, new, strict=True):
            buffer[:, :, start : self.used] = values

    def select(self, indices: Tensor) -> None:
        """Keeps only these rows, in this order; may repeat them."""
        selected = [self._room(view, len(indices), indices) for view in self.views]
        self.buffers = selected

    def merge(self, other: Self) -> None:
        """Appends the other part's rows; the shorter ones get columns of zeros in front."""
        width = max(self.used, other.used)
        parts = [[F.pad(v, (0, 0, width - p.used, 0)) for v in p.views] for p in (self, other)]
        self.buffers = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        self.limit = width + max(p.limit - p.used for p in (self, other))
        self.used = width

    def _room(self, view: Tensor, rows: int, indices: Tensor | None = None) -> Tensor:
        """A larger buffer that begins with these columns, of all rows or those of `indices`."""
        capacity = min(self.limit, max(self.used + SPARE, self.used * 3 // 2))
        buffer = view.new_empty(rows, view.shape[1], capacity, view.shape[3])
        begin = buffer[:, :, : view.shape[2]]
        if indices is None:
            begin.copy_(view)
        else:
            torch.index_select(view, 0, indices, out=begin)
        return buffer


class RaggedLayer(DynamicLayer):
    """One layer's keys and values, for up to `limit` tokens a row. Rows that begin together are a
    part of the batch, which has no more columns than its longest row needs, up to `most_parts`."""

    def __init__(self, limit: int, most_parts: int) -> None:
        super().__init__()
        self.limit, self.most_parts = limit, most_parts
        self.parts: list[Part] = []

    def get_seq_length(self) -> int:
        """Columns of the longest part."""
        return max((part.used for part in self.parts), default=0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Appends [B, heads, new, D], and returns all keys and all values: views
        [B, heads, length, D]; where the batch has several parts, a list of them each."""
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
        """Appends another layer's rows."""
        self.parts += other.parts
        while len(self.parts) > self.most_parts:
            rows = [len(part) for part in self.parts]
            at = min(range(len(rows) - 1), key=lambda i: rows[i] + rows[i + 1])
            self.parts[at].merge(self.parts.pop(at + 1))

    def select(self, rows: Sequence[Tensor]) -> None:
        """Keeps only these rows of each part, in this order; may repeat them."""
        for part, chosen in zip(self.parts, rows, strict=True):
            if len(chosen) != len(part):
                part.select(chosen)
        self.parts = [part for part in self.parts if len(part)]


class RaggedCache(Cache):
    """Keys and values of all layers (see `RaggedLayer`)."""

    layers: list[Any]  # of `RaggedLayer`

    def __init__(self, limit: int, most_parts: int) -> None:
        layer: Any = partial(RaggedLayer, limit, most_parts)
        super().__init__(layer_class_to_replicate=layer)

    def join(self, other: Self) -> None:
        """Appends another cache's rows."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs)

    def keep(self, which: Tensor) -> None:
        """Only these rows of the batch, [B]."""
        parts = which.split([len(part) for part in self.layers[0].parts])
        rows = [part.nonzero()[:, 0] for part in parts]
        for layer in self.layers:
            layer.select(rows)

    def repeat(self, rows: Tensor) -> None:
        """These rows, in this order, of a batch of one part; each may come several times."""
        for layer in self.layers:
            layer.parts[0].select(rows)


@torch.inference_mode()
def most_parts(model: Any) -> int:
    """How many parts a model's cache may have: one, unless all its layers give keys and values to
    `decode_attention` as the cache has them. That is tried, with two rows of two tokens."""
    if model.config._attn_implementation != DECODE_ATTENTION:
        return 1
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache, other = (RaggedCache(2, 2) for _ in range(2))
    for each in (cache, other):
        model(input_ids=token, past_key_values=each, use_cache=True)
    cache.join(other)
    position = {"position_ids": token.expand(2, 1) + 1}
    try:
        model(input_ids=token.expand(2, 1), past_key_values=cache, use_cache=True, **position)
    except (AttributeError, TypeError):  # it takes what isn't one tensor for one
        return 1
    return MOST_PARTS


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
