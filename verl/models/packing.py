"""list[Sample] → the tensors of one forward pass, and the attention that understands them.

The only place where tokens are shifted: the hidden state of token t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from verl.protocol import Sample


@dataclass(slots=True)
class Batch:
    """Sequences of a micro-batch, packed into one row or padded into many.

    Example: prompts [5, 6] and [7], responses [1, 2] and [3], packed. The last token of a sequence
    predicts nothing, so it stays out::

        input_ids    [[5, 6, 1, 7]]       position_ids [[0, 1, 2, 0]]
        predictors   [1, 2, 3]            targets      [1, 2, 3]
    """

    input_ids: Tensor
    """[1, T] packed, [B, W] padded on the right."""
    position_ids: Tensor
    """Same shape; starts at 0 in each sequence."""
    predictors: Tensor
    """Where, in the flattened input, the hidden states are that predict response tokens, [R]."""
    targets: Tensor
    """Those response tokens, sample after sample, [R]."""
    model_kwargs: dict[str, Any]
    """What the attention needs to know: a padding mask, or the sequences' bounds."""


def pack(samples: Sequence[Sample], device: torch.device, remove_padding: bool = True) -> Batch:
    """The tensors of one forward pass over prompts and responses.

    Without samples there is one token that predicts nothing: a rank that has run out of sequences
    still takes part in the collective operations of the others.
    """
    rows = [np.concatenate([s.prompt.token_ids, s.response_ids])[:-1] for s in samples]
    rows = [row if len(row) else np.zeros(1, np.int64) for row in rows or [()]]
    lengths = np.array([len(row) for row in rows])
    tensor = partial(torch.as_tensor, device=device)
    if remove_padding:
        starts = np.cumsum(lengths) - lengths
        input_ids = np.concatenate(rows)[None]
        position_ids = np.concatenate([np.arange(n) for n in lengths])[None]
        model_kwargs = {
            "sequence_lengths": lengths.tolist(),
            "sequence_bounds": tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            "attention_mask": None,
        }
    else:
        starts = np.arange(len(rows)) * lengths.max()
        input_ids = pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
        position_ids = np.tile(np.arange(lengths.max()), (len(rows), 1))
        model_kwargs = {"attention_mask": tensor(position_ids < lengths[:, None])}
    predictors, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for s, start in zip(samples, starts, strict=False):
        predictors.append(start + len(s.prompt.token_ids) - 1 + np.arange(s.length))
        targets.append(s.response_ids)
    return Batch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids),
        predictors=tensor(np.concatenate(predictors)),
        targets=tensor(np.concatenate(targets)),
        model_kwargs=model_kwargs,
    )


def per_token(samples: Sequence[Sample], name: str, device: torch.device) -> Tensor:
    """The field `name`, one float32 number per response token in the order of `Batch.targets`, [R].

    A field that holds one number per response is repeated for each of its tokens.
    """
    assert all(getattr(s, name) is not None for s in samples), f"{name} has not been computed"
    values = [np.broadcast_to(getattr(s, name), s.length) for s in samples]
    joined = np.concatenate(values or [np.zeros(0)])
    return torch.as_tensor(joined.astype(np.float32), device=device)


def split_per_sample(values: Tensor, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The inverse of `per_token` for results: [R] → one float32 array [L_i] per sample."""
    ends = np.cumsum([s.length for s in samples])
    return np.split(values.detach().float().cpu().numpy(), ends)[:-1]


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, one call per sequence: no work on
    other sequences' tokens, on any device.

    Args (as Hugging Face attention functions): query [1, heads, T, D], key and value
    [1, key-value heads, T, D]. Returns: [1, T, heads, D].
    """
    _refuse(others)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = zip(*(x.split(sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            t = torch.arange(q.shape[2], device=q.device)
            age = t[:, None] - t[None]
            mask = (age >= 0) & (age < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def packed_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: list[int],
    sequence_bounds: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The same in one call: `torch.nn.attention.varlen`, for GPUs (16-bit types)."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(others)
    longest = max(sequence_lengths)
    output = varlen_attn(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        sequence_bounds,
        sequence_bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def _refuse(others: dict[str, Any]) -> None:
    """Raises ValueError for attention that is more than softmax of scaled products."""
    for name in ("s_aux", "softcap"):
        if others.get(name) is not None:
            raise ValueError(
                f"attention with {name} can't run packed: set "
                "actor_rollout_ref.model.use_remove_padding=False"
            )


PACKED_ATTENTION = {"packed_sdpa": packed_sdpa, "packed_varlen": packed_varlen}


def register_packed_attention() -> None:
    """Makes `PACKED_ATTENTION` known to transformers under its names; they build no mask."""
    for name, function in PACKED_ATTENTION.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
