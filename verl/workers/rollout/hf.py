"""Batched sampling for any Hugging Face causal model, on CPU and GPU.

Work follows the tokens that are still wanted: a prompt is read once for all its responses,
finished sequences are dropped from the batch, and the KV cache is written in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from verl.models.hf import load_hf_model, stop_token_ids
from verl.models.onednn import reorder_linears
from verl.protocol import Prompt, Sample
from verl.trainer.config.model_schema import ModelConfig
from verl.trainer.config.schema import RolloutConfig
from verl.utils.device import default_dtype, empty_cache, get_device
from verl.workers.rollout.base import RolloutEngine, SamplingParams, Work

KEEP_SHARE = 0.85
"""The batch is compacted when a smaller share of its rows is unfinished."""


class InPlaceLayer(DynamicLayer):
    """One layer's KV cache: new tokens are written into a buffer that doubles when it is full."""

    def __init__(self, limit: int) -> None:
        """`limit`: most tokens that a row will ever hold."""
        super().__init__()
        self.length, self.limit = 0, limit
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, new, D] and returns views of all, [B, heads, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            self._grow(key_states, value_states, end)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def _grow(self, key_states: Tensor, value_states: Tensor, needed: int) -> None:
        old, self.buffers = self.buffers, []
        for i, new in enumerate((key_states, value_states)):
            batch, heads, _, size = new.shape
            buffer = new.new_zeros(batch, heads, min(self.limit, 2 * needed), size)
            if old:
                buffer[:, :, : self.length] = old[i][:, :, : self.length]
            self.buffers.append(buffer)

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows of the batch, in this order; may repeat them."""
        self.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`; for one new token per row without a copy of the cache for each query
    head: those that share a key-value head are so many queries of that head.

    Args: query [B, heads, T, D], key and value [B, key-value heads, length, D].
    Returns: [B, T, heads, D].
    """
    per_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.shape[2] > 1 or per_head or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    output = F.scaled_dot_product_attention(
        query.reshape(len(query), key.shape[1], -1, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask,
        scale=others.get("scaling"),
    )
    return output.reshape(len(query), 1, query.shape[1], value.shape[-1]), None


AttentionInterface.register("sdpa_decode", decode_attention)
AttentionMaskInterface.register("sdpa_decode", sdpa_mask)


class HFEngine(RolloutEngine):
    """`actor_rollout_ref.rollout.name=hf`."""

    continuous = False

    def __init__(
        self, model: ModelConfig, rollout: RolloutConfig, device: str | None, max_model_len: int
    ) -> None:
        super().__init__(rollout)
        self.device = get_device(device)
        dtype = getattr(torch, rollout.dtype or default_dtype(self.device))
        self.model = load_hf_model(model, dtype).to(self.device).eval()
        if self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation("sdpa_decode")
        reorder_linears(self.model)
        self.stop_ids = torch.tensor(stop_token_ids(model), device=self.device)

    def start_update(self) -> None:
        """Moves the weights to the device."""
        self.model.to(self.device)

    @torch.no_grad()
    def load_weights(self, bucket: dict[str, Any]) -> None:
        """Copies into the model's parameters. Raises: KeyError for a name it doesn't have."""
        params = dict(self.model.named_parameters())
        for name, value in bucket["weights"].items():
            params[name].copy_(value)

    def finish_update(self, version: int) -> None:
        """See `RolloutEngine.finish_update`."""
        reorder_linears(self.model)
        super().finish_update(version)

    def sleep(self) -> None:
        """Moves the weights to host memory."""
        self.model.to("cpu")
        empty_cache(self.device)

    @torch.inference_mode()
    def _generate(self, params: SamplingParams) -> Iterator[list[Sample]]:
        """See `RolloutEngine._generate`. At most `max_num_seqs` responses are drawn at a time."""
        while work := self._take(max(1, self.max_num_seqs // params.n), wait=True):
            rows = [(i, k) for i in range(len(work)) for k in range(params.n)]
            for start in range(0, len(rows), self.max_num_seqs):
                if not self.stopped:
                    chunk = rows[start : start + self.max_num_seqs]
                    yield from self._generate_batch(work, chunk, params)

    def _generate_batch(
        self, work: Work, rows: list[tuple[int, int]], params: SamplingParams
    ) -> Iterator[list[Sample]]:
        """Draws response k of prompt i for each (i, k) in `rows`."""
        M = params.max_tokens
        draws = [np.random.default_rng([*params.seed, work[i][1], k]).random(M) for i, k in rows]
        state = {
            "row": torch.arange(len(rows), device=self.device),
            "uniforms": torch.as_tensor(np.stack(draws), device=self.device),
            "tokens": torch.zeros(len(rows), M, dtype=torch.int64, device=self.device),
            "log_probs": torch.zeros(len(rows), M, device=self.device),
            "length": torch.zeros(
                len(rows), dtype=torch.int64, device=self.device
            ),  # 0: unfinished
        }
        limit = max(len(work[i][0].token_ids) for i, _ in rows) + M
        cache = Cache(layer_class_to_replicate=partial(InPlaceLayer, limit))
        logits, prompt_state = self._prefill([work[i][0] for i, _ in rows], cache, M)
        state |= prompt_state
        for t in range(M):
            if self.stopped:
                return
            tokens, log_probs = sample(logits, state["uniforms"][:, t], params)
            state["tokens"][:, t], state["log_probs"][:, t] = tokens, log_probs
            unfinished = state["length"] == 0
            ended = torch.isin(tokens, self.stop_ids) & (not params.ignore_eos)
            state["length"][unfinished & (ended | (t + 1 == M))] = t + 1
            unfinished = state["length"] == 0
            if unfinished.sum() <= KEEP_SHARE * len(tokens):
                yield self._samples(work, rows, state, ~unfinished)
                keep = unfinished.nonzero()[:, 0]
                if not len(keep):
                    return
                state = {name: value[keep] for name, value in state.items()}
                for layer in cache.layers:
                    layer.select(keep)
            logits = self._decode(state, cache, t)

    def _prefill(
        self, prompts: list[Prompt], cache: Cache, max_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads each distinct prompt once, padded on the left, and repeats what came of it.

        Returns: the next token's logits [B, V]; `mask` [B, P + max_tokens], which tokens of the
        cache count, and `prompt_length` [B].
        """
        distinct = list({id(p): p for p in prompts}.values())
        order = {id(p): i for i, p in enumerate(distinct)}
        lengths = np.array([len(p.token_ids) for p in distinct])
        width = lengths.max()
        ids = np.zeros((len(distinct), width), np.int64)
        for row, p in zip(ids, distinct, strict=True):
            row[width - len(p.token_ids) :] = p.token_ids
        columns = np.arange(width + max_tokens)
        mask = torch.as_tensor(columns >= width - lengths[:, None], device=self.device)
        positions = (columns[:width] - (width - lengths[:, None])).clip(min=0)
        output = self.model(
            input_ids=torch.as_tensor(ids, device=self.device),
            attention_mask=mask[:, :width],
            position_ids=torch.as_tensor(positions, device=self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        repeat = torch.tensor([order[id(p)] for p in prompts], device=self.device)
        for layer in cache.layers:
            layer.select(repeat)
        prompt_length = torch.as_tensor(lengths, device=self.device)
        state = {"mask": mask[repeat], "prompt_length": prompt_length[repeat]}
        return output.logits[:, -1][repeat], state

    def _decode(self, state: dict[str, Tensor], cache: Cache, t: int) -> Tensor:
        """Feeds token t of each row and returns the next token's logits, [B, V]."""
        width = state["mask"].shape[-1] - state["tokens"].shape[-1]  # of the prefill
        seen = width + t + 1
        padded = state["prompt_length"].min() < width
        output = self.model(
            input_ids=state["tokens"][:, t : t + 1],
            attention_mask=state["mask"][:, :seen] if padded else None,
            position_ids=(state["prompt_length"] + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _samples(
        self,
        work: Work,
        rows: list[tuple[int, int]],
        state: dict[str, Tensor],
        finished: Tensor,
    ) -> list[Sample]:
        """The finished rows as samples."""
        names = ("row", "length", "tokens", "log_probs")
        columns = [state[name][finished].cpu().numpy() for name in names]
        stop_ids = set(self.stop_ids.tolist())
        samples = []
        for row, length, tokens, log_probs in zip(*columns, strict=True):
            i, draw = rows[row]
            samples.append(
                Sample(
                    prompt=work[i][0],
                    group=work[i][1],
                    draw=draw,
                    response_ids=tokens[:length].copy(),
                    finish_reason="stop" if tokens[length - 1] in stop_ids else "length",
                    rollout_log_probs=log_probs[:length].copy(),
                )
            )
        return samples


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draws a token per row by inverting the distribution function.

    Args:
        logits: [B, V]. uniforms: one number in [0, 1) per row, [B]; decides the token.

    Returns: tokens [B], and their log-probabilities [B] under the distribution after temperature,
    top-k and top-p. At temperature 0 the most probable token, with its log-probability at 1.
    """
    logits = logits.float()
    if params.temperature == 0:
        log_probs, tokens = logits.log_softmax(-1).max(-1)
        return tokens, log_probs
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if params.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # The mass before a token decides, so that the most probable one always stays.
        drop = probs.cumsum(-1) - probs >= params.top_p
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    all_log_probs = logits.log_softmax(-1)
    cumulative = all_log_probs.exp().double().cumsum(-1)
    wanted = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], all_log_probs.gather(-1, tokens)[:, 0]
