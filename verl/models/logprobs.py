"""Log-probability and entropy of given tokens, without ever holding [tokens, vocabulary]."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from verl.models.packing import Batch
from verl.utils.device import default_tile, product


class PolicyModel(nn.Module):
    """Decoder and output embedding with one forward pass."""

    shares_prompts = False  # whether a packed prompt may be computed once for its responses

    def __init__(
        self, lm: Any, vocabulary_size: int | None = None, saving: Callable[[], Any] = nullcontext
    ) -> None:
        """`vocabulary_size`: ids that have a probability; None: all that the model knows. `saving`:
        makes a context that decides how the decoder keeps what its backward pass needs."""
        super().__init__()
        self.lm, self.vocabulary_size, self.saving = lm, vocabulary_size, saving
        self.scale, self.cap = scale_and_cap(lm)

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of the targets of all ranks that split the row, float32 [T] each."""
        decoder, options = self.lm.get_decoder(), batch.model_kwargs | {"use_cache": False}
        with self.saving():
            output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predictors]  # [T, H]
        head = self.lm.get_output_embeddings()
        options = {"bias": head.bias, "vocabulary_size": self.vocabulary_size, "cap": self.cap}
        temperature /= self.scale
        values = chunked_log_probs(hidden, head.weight, batch.targets, temperature, **options)
        log_probs, entropy = map(batch.of_all_ranks, values)
        return log_probs, entropy

    def plain_log_probs(self, ids: Tensor, count: int) -> Tensor:
        """Of the last tokens of `ids`, [1, S], by the model's own forward pass: float32 [count]."""
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in signature(self.lm.forward).parameters:
            options["logits_to_keep"] = count
        logits = self.lm(input_ids=ids[:, :-1], **options).logits[0, -count:]
        log_probs = logits[:, : self.vocabulary_size].float().log_softmax(-1)
        return log_probs.gather(-1, ids[0, -count:, None])[:, 0]


@torch.no_grad()
def scale_and_cap(lm: Any) -> tuple[float, float | None]:
    """(s, c) of a head whose products x the model makes the logits s·c·tanh(x / c); c None: s·x. By
    its own `forward`, given these x for hidden states and no head. Raises: ValueError for a head
    that does something else."""
    x = torch.tensor([2.0**-10, -1.0, 3.0, 40.0, 2.0**20])
    decoders, head = {lm.base_model, lm.get_decoder()}, lm.get_output_embeddings()
    for decoder in decoders:  # OPT's own head asks the second
        decoder.forward = lambda *args, **kwargs: _Hidden(x[None, :, None])
    head.forward = lambda hidden: hidden
    try:
        logits = lm(input_ids=torch.zeros(1, len(x), dtype=torch.int64)).logits.flatten().cpu()
    finally:
        for module in (*decoders, head):
            del module.forward
    s = (logits[0] / x[0]).item()
    c = (logits[-1] / s).item()
    if torch.allclose(logits, s * x, rtol=1e-4):
        return s, None
    if not torch.allclose(logits, s * c * torch.tanh(x / c), rtol=1e-4):
        raise ValueError(f"{type(lm).__name__}: its output is no head that scales or caps logits")
    return s, c


class _Hidden:
    """What a decoder returns: hidden states, and None of all else that a model may ask for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps hidden states and log-normalizers; the backward pass makes each tile's logits anew. The
    normalizer of a row is a running sum over tiles, relative to the largest logit so far (Milakov
    and Gimelshein, arXiv 1805.02867); the entropy's Σ p log p runs along with it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, targets, *options = args
        # Σ_j e^(x_j − peak) and Σ_j e^(x_j − peak) (x_j − peak); peak finite, or −inf − −inf is NaN
        chosen, total, moment = torch.zeros(3, len(targets), device=hidden.device)
        peak = torch.full_like(total, torch.finfo(torch.float32).min)
        for rows, _, x, place, inside in _tiles(*args):
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
        ctx.options = options
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        temperature, _, _, cap = ctx.options
        grad_log_probs, grad_entropy = (grad / temperature for grad in grads)
        both = grad_log_probs + grad_entropy * entropy
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        frozen = not ctx.needs_input_grad[1]
        grad_weight = None if frozen else torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        tiles = _tiles(hidden, weight, bias, targets, *ctx.options)
        for rows, columns, log_p, place, inside in tiles:
            slope = None if cap is None else 1 - (log_p * (temperature / cap)) ** 2  # of the cap
            # d log p(a) / d logit_j = [j = a] − p_j;  d H / d logit_j = −p_j (log p_j + H)
            log_p -= normalizer[rows, None]
            p = log_p.exp()
            log_p.clamp_(min=-1e4)  # where p is 0; -inf would make it 0 · inf = NaN
            loss = log_p.mul_(grad_entropy[rows, None]).add_(both[rows, None]).mul_(p)
            minus = torch.where(inside, -grad_log_probs[rows], 0)
            loss.scatter_add_(-1, place[:, None], minus[:, None])
            loss = loss if slope is None else loss.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns] -= loss.sum(0)
            loss = loss.to(hidden.dtype)  # minus the gradient of the logits
            _subtract_product(grad_hidden[rows], loss, weight[columns])
            if grad_weight is not None:
                _subtract_product(grad_weight[columns], loss.T, hidden[rows])
        # autograd gives each gradient the type of its input
        return grad_hidden, grad_weight, grad_bias, *5 * [None]


def _tiles(*args: Any) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Rows, vocabulary entries and their logits; the place of each row's target in the tile, and
    whether it is there at all (if not, the place is the nearest one), [n] each."""
    hidden, weight, bias, targets, temperature, tile, size, cap = args  # of `chunked_log_probs`
    for i in range(0, len(targets), tile[0]):
        for j in range(0, size, tile[1]):
            rows, columns = slice(i, i + tile[0]), slice(j, min(j + tile[1], size))
            logits = product(hidden[rows], weight[columns].T)
            logits = logits if bias is None else logits.add_(bias[columns])
            logits = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
            logits = logits if temperature == 1 else logits.div_(temperature)
            place = targets[rows].clamp(columns.start, columns.stop - 1)
            yield rows, columns, logits, place - j, place == targets[rows]


def _subtract_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total −= a @ b, in one pass where the types agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=-1)
    else:
        total -= product(a, b)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    vocabulary_size: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of its distribution, in nats: float32 [R] each,
    differentiable. `hidden` [R, H]: final hidden states; `weight` [V, H], `bias` [V]: the output
    embedding, whose logits (of which `cap` c makes c·tanh(logit / c)) are divided by `temperature`;
    ids from `vocabulary_size` on (default: V) have probability 0. `tile`: rows and vocabulary
    entries whose logits exist at a time."""
    size, tile = vocabulary_size or len(weight), tile or default_tile(hidden.device)
    return _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature, tile, size, cap)
