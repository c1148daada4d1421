"""list[Sample] → the tensors of one forward pass, and the attention that understands them. The only
place where tokens are shifted: the hidden state of token t predicts token t + 1; and where a packed
row is split over ranks (DeepSpeed-Ulysses, arXiv 2309.14509)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn.functional import pad as pad_
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from verl.algorithms.losses import LossInputs
from verl.protocol import OptimizerStep, Sample, by_prompt


@dataclass(slots=True)
class Batch:
    """Sequences of a micro-batch, packed into one row or padded into many.

    Prompts [5, 6] and [7] with responses [1, 2] and [3], packed; the last token of a sequence
    predicts nothing, so it stays out::

        input_ids    [[5, 6, 1, 7]]       position_ids [[0, 1, 2, 0]]
        predictors   [1, 2, 3]            targets      [1, 2, 3]

    A prompt [5, 6] that responses [1, 2] and [3, 4] share is there once. Three segments attend to
    keys of the row at `key_index`, the later ones to the prompt's first::

        input_ids    [[5, 6, 1, 3]]       position_ids [[0, 1, 2, 2]]
        predictors   [1, 2, 1, 3]         targets      [1, 2, 3, 4]
        key_index    [0, 1,  0, 1, 2,  0, 1, 3]
    """

    input_ids: Tensor  # all but the last tokens: [1, S] packed, [B, W] padded on the right
    position_ids: Tensor  # same shape; starts at 0 in each sequence
    targets: Tensor  # the response tokens that count, sample after sample, [T]
    predictors: Tensor  # where, in the flattened input, the hidden states are that predict them
    model_kwargs: dict[str, Any]  # for the attention: a padding mask, or the sequences' bounds
    group: Any = None  # of the ranks that hold a piece of the row each; None: the row is whole
    elsewhere: tuple[int, int] = (0, 0)  # targets before and after these, on the group's others

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """Values of `targets` → those of all the group's, in order, on each of its ranks. Their
        gradient is that of the ranks' sum: of a loss that each rank computes, a multiple."""
        if self.group is None:
            return values
        padded = pad_(values, self.elsewhere)
        total = collectives.wait_tensor(collectives.all_reduce(padded, "sum", self.group))
        return total.clone()  # FSDP's hooks don't like views


def pack(
    samples: Sequence[Sample],
    device: torch.device,
    remove_padding: bool = True,
    group: Any = None,
    share: bool = False,
) -> Batch:
    """The tensors of one forward pass; with `group`, this rank's of equal pieces of the packed row,
    one for each rank of that process group. Tokens that predict nothing are added where a piece is
    short, or without samples: a rank that has run out of them still takes part in collectives.
    `share`: a whole packed row holds a prompt once for all its responses."""
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    assert group is None or (remove_padding and not share)
    tensor = partial(torch.as_tensor, device=device)
    rows, seen, predictors = _segments(samples, share and remove_padding)
    if short := -sum(map(len, rows)) % ranks:
        rows.append(np.zeros(short, np.int64))
        seen.append(np.arange(short))
    lengths, visible = (np.array([*map(len, x)]) for x in (rows, seen))
    position_ids = np.arange(lengths.max()) + (visible - lengths)[:, None]
    input_ids, mask = np.zeros_like(position_ids), np.arange(lengths.max()) < lengths[:, None]
    input_ids[mask] = np.concatenate(rows)
    none = np.zeros(0, np.int64)
    where = np.concatenate([none, *predictors])
    if not remove_padding:
        model_kwargs: dict[str, Any] = {"attention_mask": tensor(mask)}
        where = np.flatnonzero(mask)[where]
    else:
        input_ids, position_ids = input_ids[mask][None], position_ids[mask][None]
        shared = visible.tolist() if visible.sum() > lengths.sum() else None
        model_kwargs = sequence_kwargs(lengths.tolist(), device, shared)
        model_kwargs["sequence_group"] = group
        if shared:
            model_kwargs["key_index"] = tensor(np.concatenate(seen))
    wanted = np.concatenate([none, *(s.counted(s.response_ids) for s in samples)])
    size = input_ids.size // ranks
    begin, end = np.searchsorted(where, [rank * size, (rank + 1) * size]).tolist()
    ids, positions = (np.split(x, ranks, axis=1)[rank] for x in (input_ids, position_ids))
    mine, predicting = tensor(wanted[begin:end]), tensor(where[begin:end] - rank * size)
    others = begin, len(where) - end
    return Batch(tensor(ids), tensor(positions), mine, predicting, model_kwargs, group, others)


def _segments(
    samples: Sequence[Sample], share: bool
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Of a packed row: the tokens of each segment, one at least; where those are that its last one
    attends to, itself included; and where each sample's predictors are. Segments are the sequences,
    without their last tokens; where samples share a prompt, this, and what follows it."""
    rows: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    predictors: list[np.ndarray] = [np.zeros(0, np.int64)] * len(samples)
    end = 0

    def add(tokens: np.ndarray, prefix: np.ndarray) -> np.ndarray:
        nonlocal end
        visible = np.concatenate([prefix, np.arange(end, end + len(tokens))])
        if len(tokens):
            rows.append(tokens)
            seen.append(visible)
            end += len(tokens)
        return visible

    for members in by_prompt(samples) if share else [[i] for i in range(len(samples))]:
        prompt, prefix = samples[members[0]].prompt.token_ids, np.zeros(0, np.int64)
        if len(members) > 1:
            prefix = add(prompt, prefix)
        for i in members:
            s = samples[i]
            tokens = np.concatenate([prompt, s.response_ids])[len(prefix) : -1]
            visible = add(tokens if len(tokens) or len(prefix) else np.zeros(1, np.int64), prefix)
            before = visible[max(0, len(prompt) - 1) :]
            predictors[i] = s.counted(before[: len(s.response_ids)])
    if not rows:
        add(np.zeros(1, np.int64), np.zeros(0, np.int64))
    return rows, seen, predictors


def sequence_kwargs(
    lengths: list[int], device: torch.device, key_lengths: list[int] | None = None
) -> dict[str, Any]:
    """What an attention must know of a packed row: the sequences' lengths, and where they begin, as
    FlashAttention wants it; with `key_lengths` the same of keys, whose last ones are their own."""
    kwargs: dict[str, Any] = {"sequence_lengths": lengths, "attention_mask": None}
    for end, sizes in (("q", lengths), ("k", key_lengths or lengths)):
        bounds = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=device)
        kwargs |= {f"cu_seq_lens_{end}": bounds, f"max_length_{end}": max(sizes)}
    return kwargs | ({"key_lengths": key_lengths} if key_lengths else {})


def loss_inputs(step: OptimizerStep, log_probs: Tensor, entropy: Tensor) -> LossInputs:
    """What the loss sees of a micro-batch. `log_probs`, `entropy`: of `Batch.targets`, [T]."""
    samples, device = step.samples, log_probs.device
    lengths = [s.length for s in samples]

    def of_response(values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.repeat(np.asarray(values, np.float32), lengths), device=device)

    def of_token(name: str, otherwise: Tensor | None = None) -> Any:
        absent = [getattr(s, name) is None for s in samples]
        if any(absent):
            assert all(absent), f"some responses of a micro-batch have no {name}"
            return otherwise
        counted = [s.counted(getattr(s, name)) for s in samples]
        return torch.as_tensor(np.concatenate([np.zeros(0, np.float32), *counted]), device=device)

    return LossInputs(
        log_probs,
        entropy,
        lengths=torch.as_tensor(lengths, dtype=torch.int64, device=device),
        weights=of_response(step.weights),
        regularizer_weights=of_response(
            step.weights if step.regularizer_weights is None else step.regularizer_weights
        ),
        advantages=of_token("token_advantages", of_response([s.advantage for s in samples])),
        old_log_probs=of_token("old_log_probs"),
        ref_log_probs=of_token("ref_log_probs"),
        rollout_log_probs=of_token("rollout_log_probs"),
        selected=of_token("selected"),
        values=of_token("values"),
        returns=of_token("returns"),
        frozen=of_token("frozen"),
    )


def per_token_of_response(values: Tensor, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Results for `Batch.targets`, [T] → one float32 array [R] per sample, 0 for other tokens."""
    ends = np.cumsum([s.length for s in samples])
    arrays = np.split(values.detach().float().cpu().numpy(), ends)[:-1]
    return [s.spread(array) for s, array in zip(samples, arrays, strict=True)]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers, with `Batch.model_kwargs` among the options: causal
    within each sequence of a packed row, one call per sequence, on any device. query
    [1, heads, T, D], key and value [1, key-value heads, T, D] → [1, T, heads, D]. Raises:
    ValueError for a model whose attention is more than this."""
    window = _sliding_window(attention_mask, options)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = options["sequence_lengths"]
    keys = options.get("key_lengths", lengths)
    parts = (x.split(n, dim=2) for x, n in ((query, lengths), (key, keys), (value, keys)))
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        mask, unread, length, total = None, 0, q.shape[2], k.shape[2]
        before = total - length  # keys of a shared prompt
        windowed = window is not None and total > window
        if windowed or before > length:
            mask = q.new_ones(length, total, dtype=torch.bool).tril(before)
            mask = mask.triu(before + 1 - window) if windowed else mask
        elif before:  # faster than a mask: more queries
            q, unread = pad_(q, (0, 0, before, 0)), before
        outputs.append(_attend(q, k, v, mask, options)[:, :, unread:])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Of one sequence; a sink becomes a first key that all queries give its own logit, with value
    0, by `EXTRA` more features."""
    scale, sink = options.get("scaling") or q.shape[-1] ** -0.5, options.get("s_aux")
    if options.get("softcap") is not None:
        return explicit_attention(q, k, v, mask, **options)
    if sink is None:
        return sdpa(q, k, v, mask, is_causal=mask is None, scale=scale)
    q, k, v = pad_(q, (0, EXTRA, 1, 0), value=1), *(pad_(x, (0, EXTRA, 1, 0)) for x in (k, v))
    k[:, :, 0, -EXTRA:] = (sink / scale / EXTRA)[:, None].to(k.dtype)
    mask = mask if mask is None else pad_(mask, (1, 0, 1, 0), value=True)
    output = sdpa(q, k, v, mask, is_causal=mask is None, scale=scale)
    return output[:, :, 1:, :-EXTRA]


EXTRA = 8  # fast kernels want heads of a multiple of it


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention that holds all scores: softmax of c·tanh(score / c), c = `softcap`, beside a sink's
    logit `s_aux` [heads]. [B, heads, T, D] each; `mask`: what is seen, or what is added to scores;
    None: what came before is seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        new, total = scores.shape[-2:]
        mask = scores.new_ones(new, total, dtype=torch.bool).tril(total - new)
    if mask.dtype == torch.bool:
        # Not -inf: padding that sees nothing would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    scores = scores.float()
    if s_aux is not None:
        sink = s_aux.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def packed_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same in one call: `torch.nn.attention.varlen`, for GPUs (16-bit types)."""
    from torch.nn.attention.varlen import varlen_attn

    if options.get("s_aux") is not None or options.get("softcap") is not None:
        return packed_attention(module, query, key, value, attention_mask, **options)
    visible = ((_sliding_window(attention_mask, options) or 0) - 1, 0)  # before (-1: all) and after
    bounds = [options[f"{name}_{end}"] for name in ("cu_seq_lens", "max_length") for end in "qk"]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale, gqa = options.get("scaling"), query.shape[1] != key.shape[1]
    output = varlen_attn(q, k, v, *bounds, scale=scale, window_size=visible, enable_gqa=gqa)
    assert isinstance(output, Tensor)  # the only thing that was asked for
    return output[None], None


def _sliding_window(mask: Tensor | None, options: dict[str, Any]) -> int | None:
    """Tokens that each one sees. Raises: ValueError for a model that has masks of its own, or does
    not say where sequences begin."""
    if "sequence_lengths" not in options or (mask is not None and mask.dim()):
        raise ValueError("its attention has masks of its own, or can't tell sequences apart")
    window: int | None = options.get("sliding_window")
    return int(mask) if mask is not None else window


def _mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor | None:
    """Instead of a mask, for models that don't give it to the attention: the window's size, []."""
    return None if local_size is None else torch.tensor(local_size)


def over_ranks(
    attention: Callable[..., tuple[Tensor, None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_group: Any = None,
    key_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function over a row whose pieces the ranks of a group hold: each rank computes
    its share of the heads over the whole row. query [1, heads, T / ranks, D], key and value [1,
    key-value heads, T / ranks, D] → [1, T / ranks, heads, D]. Where there are fewer heads of keys
    than ranks, they are repeated. Without a group it is `attention` itself, with keys and values
    from `key_index` of the row, if given: a shared prompt's once for each response."""
    if sequence_group is None:
        if key_index is not None:
            key, value = key.index_select(2, key_index), value.index_select(2, key_index)
        return attention(module, query, key, value, attention_mask, **options)
    ranks = dist.get_world_size(sequence_group)
    repeat = ranks // math.gcd(ranks, key.shape[1])
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    if (sinks := options.get("s_aux")) is not None:  # one a head
        options["s_aux"] = sinks.chunk(ranks)[dist.get_rank(sequence_group)]
    whole = (_exchange(x, sequence_group, ranks) for x in (query, key, value))
    output, _ = attention(module, *whole, attention_mask, **options)
    return _exchange(output, sequence_group, ranks), None


def _exchange(x: Tensor, group: Any, ranks: int) -> Tensor:
    """[1, A, B, D] on each rank → [1, A / ranks, B · ranks, D]: rank i gets the i-th part of A."""
    parts = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    received = collectives.all_to_all_single(parts, None, None, group)
    return collectives.wait_tensor(received).movedim(0, 2).flatten(2, 3)


for function in (packed_attention, packed_varlen):  # by these names
    AttentionInterface.register(function.__name__, partial(over_ranks, function))
    AttentionMaskInterface.register(function.__name__, _mask)
FLASH = "flash_attention_3"  # transformers' own
AttentionInterface.register(FLASH, partial(over_ranks, AttentionInterface()[FLASH]))
