"""A KV cache of rows that differ in length, written in place, and an attention that reads it so."""

import threading
from bisect import bisect_left
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
MAX_PARTS = 8  # each costs a call of the attention
SPARE = 32  # columns that a new buffer has to spare
MOST = 0.75  # of a buffer's rows must be in use, or it is made smaller


@dataclass(slots=True)
class Part:
    """Keys and values of neighbouring rows of the batch. All end in its last column; shorter rows
    have padding in front."""

    buffers: list[Tensor]  # keys and values, [rows and more, heads, columns and more, D] each
    limit: int  # columns that its rows will need at most
    rows: int
    begin: int = 0  # the first column that holds something
    end: int = 0  # the one after the last

    @property
    def used(self) -> int:
        """How many columns hold something."""
        return self.end - self.begin

    @property
    def views(self) -> list[Tensor]:
        """Keys and values, [rows, heads, used, D] each."""
        return [buffer[: self.rows, :, self.begin : self.end] for buffer in self.buffers]

    def append(self, new: Sequence[Tensor]) -> None:
        """Appends columns of keys and values, [rows, heads, new, D] each."""
        number = new[0].shape[2]
        if self.end + number > self.buffers[0].shape[2]:
            for view, old in self._renewed(self.rows, self.used + number):
                view[:, :, :-number] = old
        else:
            self.end += number
        for view, values in zip(self.views, new, strict=True):
            view[:, :, -number:] = values

    def select(self, rows: Tensor, width: int) -> None:
        """Replaces its rows by these, in this order, each any number of times; keeps the last
        columns."""
        self._drop_columns(self.used - width)
        for view, old in self._renewed(len(rows), width):
            torch.index_select(old, 0, rows, out=view)

    def keep(self, order: Tensor, moved: Tensor, width: int) -> None:
        """As `select`, where only the places in `moved` get another row. Copies only these, as long
        as the rest are most of what the buffers have memory for."""
        if len(order) <= MOST * len(self.buffers[0]):
            return self.select(order, width)
        self._drop_columns(self.used - width)
        if len(moved):
            for view in self.views:
                view[moved] = view[order[moved]]
        self.rows = len(order)

    def merge(self, other: Self) -> None:
        """Appends the other part's rows; the shorter ones get columns of zeros in front."""
        theirs, rows, mine = other.views, self.rows, self.used
        width = max(self.used, other.used)
        self.limit = width + max(part.limit - part.used for part in (self, other))
        pairs = self._renewed(rows + other.rows, width)
        for (view, old), more in zip(pairs, theirs, strict=True):
            view.zero_()
            view[:rows, :, width - mine :] = old
            view[rows:, :, width - other.used :] = more

    def _drop_columns(self, number: int) -> None:
        """Drops the first ones."""
        self.begin += number
        self.limit -= number

    def _renewed(self, rows: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """Makes the buffers new, without content, for so many rows, so many columns and more;
        returns the views of each, new and old."""
        old = self.views
        more = max(SPARE, min(self.limit - width, width // 2))
        self.buffers = [x.new_empty(rows, x.shape[1], width + more, x.shape[3]) for x in old]
        self.rows, self.begin, self.end = rows, 0, width
        return list(zip(self.views, old, strict=True))


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
            empty = [key_states[:, :, :0], value_states[:, :, :0]]
            self.parts = [Part(empty, self.limit, len(key_states))]
        sizes = [part.rows for part in self.parts]
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
        return abs(one.used - other.used) * shorter.rows, one.rows + other.rows


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

    def keep(self, rows: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Keeps these rows of the batch, in ascending order; `tokens`: of each. Returns the order
        that they have then: of each part the last ones take the places of those that are gone."""
        parts: list[Part] = self.layers[0].parts
        device, begin, order = parts[0].buffers[0].device, 0, list[int]()
        to = partial(torch.tensor, dtype=torch.int64, device=device)
        changes: dict[int, tuple[Tensor, Tensor, int]] = {}  # of parts of which something is left
        for i, part in enumerate(parts):
            first, last = (bisect_left(rows, row) for row in (begin, begin + part.rows))
            size, own = last - first, [row - begin for row in rows[first:last]]
            gone = sorted({*range(size)}.difference(own))
            places = [*range(size)]
            for place, row in zip(gone, own[size - len(gone) :], strict=True):
                places[place] = row
            order += [begin + row for row in places]
            begin += part.rows
            if size:
                changes[i] = to(places), to(gone), max(tokens[first:last])
        for layer in self.layers:
            for i, change in changes.items():
                layer.parts[i].keep(*change)
            layer.parts = [layer.parts[i] for i in changes]
        return order

    def repeat(self, rows: Tensor) -> None:
        """These rows, in this order, of a batch of one part; each may come several times."""
        for layer in self.layers:
            layer.parts[0].select(rows, layer.parts[0].used)


def next_logits(
    model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache
) -> Tensor:
    """Those of the tokens after `ids`, [B, T], of which the cache gets keys and values; [B, V].
    `mask`: which columns of the cache, with the new ones, are not padding, [B, length]."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@torch.inference_mode()
def example(
    model: Any, max_parts: int, lengths: Sequence[int]
) -> tuple[RaggedCache, tuple[Tensor, Tensor, Tensor]]:
    """A cache of rows of so many tokens, 0, 1, 2, …, and what else `next_logits` gets to read one
    more of each."""
    first, *others = caches = [RaggedCache(max(lengths) + 1, max_parts) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        tokens = torch.arange(length, device=model.device)[None]
        next_logits(model, tokens, None, tokens, cache)
    for other in others:
        first.join(other)
    ends = torch.tensor(lengths, device=model.device)[:, None]
    columns = torch.arange(max(lengths) + 1, device=model.device)
    return first, (ends, columns >= max(lengths) - ends, ends.clone())


@torch.inference_mode()
def max_parts(model: Any) -> int:
    """How many parts a model's cache may have: one, unless all its layers give keys and values to
    `decode_attention` as the cache has them. That is tried."""
    if model.config._attn_implementation != DECODE_ATTENTION:
        return 1
    cache, inputs = example(model, 2, [2, 1])
    try:
        next_logits(model, *inputs, cache)
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
    key-value head are so many queries of that head. On a CPU in float32 they are two matrix
    products, which are faster than `sdpa` for short caches. In a graph it is one operation."""
    if torch.compiler.is_compiling():
        options = kw.get("scaling"), kw.get("softcap"), kw.get("s_aux")
        return attend(query, key, value, attention_mask, module.layer_idx, *options), None
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
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    if query.device.type == "cpu" and query.dtype == torch.float32 and not boolean:
        scores = (heads * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        output = (scores if attention_mask is None else scores + attention_mask).softmax(-1) @ value
    else:
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


in_use = threading.local()  # its `cache` is that of the graph which this thread runs


@torch.library.custom_op("verl::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    layer: int,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """`decode_attention` of one new token a row as an operation of a graph: puts its key and value
    into `in_use.cache`, and attends to all that are there. Of more rows than the cache has, which
    are copies of the first, it returns copies."""
    rows = sum(part.rows for part in in_use.cache.layers[layer].parts)
    keys, values = in_use.cache.update(key[:rows], value[:rows], layer)
    options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    found = decode_attention(None, query[:rows], keys, values, mask[:rows], **options)[0]
    return found.expand(len(query), -1, -1, -1).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    # `len(query)` would be a constant of the graph.
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, mask_of_scores)
