"""Log-probability and entropy of given tokens, without ever holding [tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from verl.utils.device import default_tile


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps hidden states and log-normalizers; the backward pass makes each tile's logits anew.

    The normalizer of a row is a running sum over tiles, relative to the largest logit so far
    (Milakov and Gimelshein, arXiv 1805.02867); the entropy's Σ p log p runs along with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        chosen, total, moment = zeros, zeros.clone(), zeros.clone()
        # Σ_j e^(x_j − peak) and Σ_j e^(x_j − peak) (x_j − peak); peak finite, or −inf − −inf is NaN
        peak = torch.full_like(zeros, torch.finfo(torch.float32).min)
        for rows, columns, place, inside in _tiles(targets, len(weight), tile):
            x = _logits(hidden[rows], weight, bias, columns, temperature)
            chosen[rows] += torch.where(inside, x.gather(-1, place[:, None])[:, 0], 0)
            before, peak[rows] = peak[rows].clone(), torch.maximum(peak[rows], x.amax(-1))
            x -= peak[rows, None]
            e = x.exp()
            shift = before - peak[rows]
            moment[rows] = (moment[rows] + shift * total[rows]) * shift.exp()
            total[rows] = total[rows] * shift.exp() + e.sum(-1)
            # Masked tokens have logit -inf and probability 0: they add nothing.
            moment[rows] += e.mul_(x.clamp_(min=-1e4)).sum(-1)
        log_total = total.log()
        normalizer, entropy = peak + log_total, log_total - moment / total
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.temperature, ctx.tile = temperature, tile
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        grad_log_probs, grad_entropy = (grad / ctx.temperature for grad in grads)
        both = grad_log_probs + grad_entropy * entropy
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows, columns, place, inside in _tiles(targets, len(weight), ctx.tile):
            # d log p(a) / d logit_j = [j = a] − p_j;  d H / d logit_j = −p_j (log p_j + H)
            log_p = _logits(hidden[rows], weight, bias, columns, ctx.temperature)
            log_p -= normalizer[rows, None]
            p = log_p.exp()
            log_p.clamp_(min=-1e4)  # where p is 0; -inf would make it 0 · inf = NaN
            loss = log_p.mul_(grad_entropy[rows, None]).add_(both[rows, None]).mul_(p)
            minus = torch.where(inside, -grad_log_probs[rows], 0)
            loss.scatter_add_(-1, place[:, None], minus[:, None])
            if grad_bias is not None:
                grad_bias[columns] -= loss.sum(0)
            loss = loss.to(hidden.dtype)  # minus the gradient of the logits
            _subtract_product(grad_hidden[rows], loss, weight[columns])
            _subtract_product(grad_weight[columns], loss.T, hidden[rows])
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias, *(None,) * 3


def _tiles(
    targets: Tensor, vocabulary: int, tile: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows and vocabulary entries; where in the tile each row's target is, and whether it is there
    at all (if not, the place is the nearest one), [n] each."""
    for i in range(0, len(targets), tile[0]):
        for j in range(0, vocabulary, tile[1]):
            rows, columns = slice(i, i + tile[0]), slice(j, min(j + tile[1], vocabulary))
            place = targets[rows].clamp(columns.start, columns.stop - 1)
            yield rows, columns, place - j, place == targets[rows]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, temperature: float
) -> Tensor:
    bias = None if bias is None else bias[columns]
    logits = torch.nn.functional.linear(hidden, weight[columns], bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _subtract_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total −= a @ b, in one pass where the types agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=-1)
    else:
        total -= a @ b


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, in nats.

    Args:
        hidden: final hidden states, [R, H]. weight: output embedding, [V, H]. bias: [V] or None.
        targets: token ids, [R]. temperature: logits are divided by it.
        tile: rows and vocabulary entries whose logits exist at a time; default: what the device
            likes best.

    Returns: (log_probs, entropy), float32 [R] each, differentiable.
    """
    tile = tile or default_tile(hidden.device)
    return _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature, tile)
