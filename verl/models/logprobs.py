"""Log-probability and entropy of given tokens, without ever holding [tokens, vocabulary]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25
"""Logits that exist at a time, in elements (128 MiB in float32)."""


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps hidden states and log-normalizers; the backward pass makes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy, normalizer = torch.empty_like(log_probs), torch.empty_like(log_probs)
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            logits = _logits(hidden[part], weight, bias, temperature)
            normalizer[part] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[part, None])[:, 0]
            log_probs[part] = chosen - normalizer[part]
            logits -= normalizer[part, None]
            probs = logits.exp()
            # Masked tokens have log-probability -inf and probability 0: they add nothing.
            logits.clamp_(min=torch.finfo(torch.float32).min)
            entropy[part] = -probs.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropy = grads
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for i in range(0, len(targets), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            # d log p(a) / d logit_j = [j = a] − p_j;  d H / d logit_j = −p_j (log p_j + H)
            log_p = _logits(hidden[part], weight, bias, ctx.temperature)
            log_p -= normalizer[part, None]
            p = log_p.exp()
            log_p.clamp_(min=-1e4)  # where p is 0; -inf would make it 0 · inf = NaN
            log_p += entropy[part, None]
            log_p *= grad_entropy[part, None]
            log_p += grad_log_probs[part, None]
            grad = p.mul_(log_p).neg_()
            grad.scatter_add_(-1, targets[part, None], grad_log_probs[part, None])
            grad /= ctx.temperature
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += grad.T @ hidden[part]
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, in nats.

    Args:
        hidden: final hidden states, [R, H]. weight: output embedding, [V, H]. bias: [V] or None.
        targets: token ids, [R]. temperature: logits are divided by it.
        chunk: rows whose logits exist at a time; default: `CHUNK_ELEMENTS` / V.

    Returns: (log_probs, entropy), float32 [R] each, differentiable.
    """
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    return _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature, chunk)
