"""A KV cache that is written in place, and an attention that reads it as it is."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from verl.models.packing import explicit_attention

DECODE_ATTENTION = "decode"  # transformers' name of `decode_attention`


class InPlaceLayer(DynamicLayer):
    """One layer's keys and values: views of buffers that double, up to `limit` tokens a row."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.buffers: list[Tensor]  # keys and values, [B, heads, capacity, D] each

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, new, D] and returns views of all, [B, heads, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            free = (0, 0, 0, min(self.limit, 2 * end) - start)
            self.buffers = [F.pad(buffer[:, :, :start], free) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def join(self, other: Self, length: int, more: int) -> None:
        """Appends another layer's rows. Of both the last `length` tokens stay, or so many are made
        of zeros in front; `more` tokens a row may follow."""
        parts = []
        for layer in (self, other):
            used = layer.get_seq_length()
            free = (0, 0, length - used, 0)
            parts.append([F.pad(b[:, :, :used], free) for b in layer.buffers])
        self.buffers = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        self.keys, self.values = self.buffers
        self.limit = length + more

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows of the batch, in this order; may repeat them."""
        length = self.get_seq_length()
        self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def decode_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, [B, heads, T, D] → [B, T, heads, D], with sinks and caps of scores; for
    T = 1 without copies of the cache: query heads that share a key-value head are so many queries
    of that head."""
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


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, sdpa_mask)
