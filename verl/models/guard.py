"""Whether a model can be trained: before anything starts, by its structure; at each start, by its
log-probabilities, which must be those of transformers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from verl.config.schema import ModelConfig
from verl.models.packing import Batch, packed_attention, sequence_kwargs
from verl.protocol import Prompt, Sample

logger = logging.getLogger(__name__)

COUNTED = 8  # last tokens of each sequence that are compared
LONGEST_WINDOW = 4096  # the first sequence is longer than a window of the attention up to this
TOLERANCE = {4: 1e-3, 2: 0.3}
"""Nats a token that rounding alone may do, by bytes of the type. In 16 bits it is, if that is less,
three times what the model's own two attentions, eager and SDPA, differ by, and `SLACK`, as experts
may change places."""
SLACK = 0.02


def other_layers(lm: Any) -> set[str]:
    """Kinds of layers that are not attention to all tokens before, or to a window of them."""
    kinds = {*(getattr(lm.config.get_text_config(), "layer_types", None) or ())}
    kinds -= {"full_attention", "sliding_attention"}
    return kinds or ({"recurrent"} if lm._is_stateful else set())


def decoder_layers(lm: Any) -> list[nn.Module]:
    """The modules that are sharded one by one, by the names that the model gives."""
    return [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or ())]


@torch.no_grad()
def check_family(lm: Any, model: ModelConfig) -> None:
    """`lm`: the model without memory for its weights. Raises: ValueError for one that has no
    attention or, where sequences are packed, one whose layers would mix them."""
    name = f"{model.path}: a {lm.config.model_type} model"
    kinds = {type(m).__name__ for m in lm.modules()} - {"RwkvSelfAttention"}  # which is recurrent
    if lm._is_stateful and not any("Attention" in kind for kind in kinds):
        raise ValueError(f"{name} has no attention, and no engine that gets its weights")
    if lm.get_decoder() is lm or not decoder_layers(lm):
        raise ValueError(f"{name} does not name its decoder, or that one's layers: not supported")
    if hasattr(lm.config, "keep_window_size"):  # Doge
        raise ValueError(f"{name} chooses the tokens it sees by the whole batch: not supported")
    if model.enable_gradient_checkpointing and not lm.supports_gradient_checkpointing:
        off = f"set {model.section}.enable_gradient_checkpointing=False"
        raise ValueError(f"{name} has no gradient checkpointing: {off}")
    if not model.use_remove_padding:
        return
    unpack = f"set {model.section}.use_remove_padding=False"
    own = set() if lm._can_set_attn_implementation() else {"an attention of its own"}
    if others := other_layers(lm) | own:  # Jamba, BLOOM, …
        text = ", ".join(sorted(others))
        raise ValueError(f"{name} has layers that mix packed sequences ({text}): {unpack}")
    lm.set_attn_implementation(packed_attention.__name__)
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    options = sequence_kwargs([1, 1], ids.device) | {"attention_mask": torch.ones_like(ids)}
    try:
        lm.get_decoder()(input_ids=ids, use_cache=False, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} can't run packed ({error}): {unpack}") from None
    except RuntimeError:  # without weights not all can be computed; `check_policy` comes later
        pass


@torch.no_grad()
def check_policy(
    policy: Any,
    model: ModelConfig,
    dtype: torch.dtype,
    packer: Callable[..., Batch],
    share_prompts: bool,
) -> bool:
    """Compares log-probabilities of two short sequences, packed or padded into one pass by `packer`
    as training does, with those that transformers' forward with plain attention gives of each
    alone. Collective. Returns whether a packed prompt may be computed once for all its responses:
    that is wanted (`share_prompts`), and does not change them. Raises: ValueError, with the
    difference, if they are not the same up to rounding."""
    register_fsdp_forward_method(policy, "plain_log_probs")
    lm, rng = policy.lm, np.random.default_rng(0)
    config = lm.config.get_text_config()
    windows = [v for k, v in vars(config).items() if "window" in k and type(v) is int]
    longest = max([v for v in windows if v <= LONGEST_WINDOW], default=0) + 2 * COUNTED + 1
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    samples = []
    for length in (longest, COUNTED + 4):
        ids = rng.integers(0, policy.vocabulary_size, length)
        prompt = Prompt(0, ids[:-COUNTED], "", None)
        samples.append(Sample(prompt, 0, ids[-COUNTED:].astype(np.int32), "length"))
    ours, _ = policy(packer(samples), 1.0)
    rows = [np.concatenate([s.prompt.token_ids, s.response_ids])[None] for s in samples]
    usual, settable = lm.config._attn_implementation, lm._can_set_attn_implementation()

    def plain(attention: str) -> Tensor:
        if settable:
            lm.set_attn_implementation(attention)
        ids = (torch.as_tensor(row, device=ours.device) for row in rows)
        return torch.cat([policy.plain_log_probs(row, COUNTED) for row in ids])

    eager, limit = plain("eager"), TOLERANCE[dtype.itemsize]
    if dtype.itemsize == 2 and settable and lm._supports_sdpa:
        rounding = (plain("sdpa") - eager).abs().mean().item()
        limit = min(limit, 3 * rounding + SLACK)
    if settable:
        lm.set_attn_implementation(usual)
    difference = (ours - eager).abs().mean().item()
    if not difference < limit:  # or it is not a number
        way, other = "padded", "no setting of ours helps: take another model"
        if model.use_remove_padding:
            way, other = "packed", f"set {model.section}.use_remove_padding=False"
        raise ValueError(
            f"{model.path}: {way}, log-probabilities of a {config.model_type} model differ by "
            f"{difference:.3g} nats a token from transformers' own (rounding: {limit:.2g}): {other}"
        )
    wanted = share_prompts and model.use_remove_padding
    shares = wanted and _shares_prompts(policy, samples[0], packer, limit)
    policy.reshard()  # without a backward pass the root's parameters stay gathered
    return shares


def _shares_prompts(
    policy: Any, sample: Sample, packer: Callable[..., Batch], limit: float
) -> bool:
    """Whether the log-probabilities of two responses stay when their prompt is computed once. Ranks
    that split sequences don't do that."""
    both = [sample, replace(sample, response_ids=sample.response_ids[::-1])]
    apart = packer(both)
    if apart.group is not None:
        return False
    together = policy(packer(both, share=True), 1.0)[0]
    difference = (together - policy(apart, 1.0)[0]).abs().mean().item()
    if not (same := difference < limit):
        text = "prompts are computed for each response: once they'd be %.3g nats a token off"
        logger.warning(text, difference)
    return same
