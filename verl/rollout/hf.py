"""Batched sampling for any Hugging Face causal model, on CPU and GPU. A prompt is read once for all
its responses, finished sequences are dropped from the batch, the KV cache is written in place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from verl.config.schema import ModelConfig, RolloutConfig
from verl.models.folder import skeleton
from verl.models.guard import other_layers
from verl.models.hf import load_hf_model, reorder_linears, stop_token_ids, vocabulary_size
from verl.models.kv_cache import DECODE_ATTENTION, InPlaceLayer
from verl.protocol import Prompt, Sample, SampleBatch, WeightChunk
from verl.rollout.engine import RolloutEngine, Row, SamplingParams, rows_of
from verl.utils.device import default_dtype, empty_cache, get_device

KEEP_SHARE = 0.85  # the batch is compacted when a smaller share of its rows is unfinished


class HFEngine(RolloutEngine):
    """`actor_rollout_ref.rollout.name=hf`."""

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """See `RolloutEngine.check`: prompts are padded, which a recurrent state would remember."""
        lm = skeleton(model)
        if kinds := other_layers(lm) - {"chunked_attention"}:
            problem = f"a {lm.config.model_type} model has other layers than attention"
            remedy = f"({', '.join(sorted(kinds))}): set actor_rollout_ref.rollout.name=vllm"
            raise ValueError(f"{model.path}: {problem} {remedy}")

    def build(self, model: ModelConfig, rollout: RolloutConfig, device: str, *_: Any) -> None:
        """See `RolloutEngine.build`."""
        self.max_num_seqs = rollout.max_num_seqs
        self.device = get_device(device)
        dtype = getattr(torch, rollout.dtype or default_dtype(device))
        self.model = cast(PreTrainedModel, load_hf_model(model, dtype)).eval()
        self.model.to(self.device)
        if self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation(DECODE_ATTENTION)
        reorder_linears(self.model)
        self.stop_ids, self.vocabulary_size = stop_token_ids(model), vocabulary_size(model)

    def start_update(self) -> None:
        """Moves the weights to the device."""
        self.model.to(self.device)

    @torch.no_grad()
    def load_weights(self, chunk: WeightChunk) -> None:
        """Copies into the model's weights. Raises: KeyError for a name it doesn't have."""
        params = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        assert chunk.tensors is not None
        for name, value in zip(chunk.names, chunk.tensors, strict=True):
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
    def generate(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Iterator[list[Sample]]:
        """See `RolloutEngine.generate`. `max_num_seqs` responses are a batch."""
        self.stopped = False
        rows = rows_of(prompts, groups, params.num_responses)
        for start in range(0, len(rows), self.max_num_seqs):
            if not self.stopped:
                yield from self._generate_batch(rows[start : start + self.max_num_seqs], params)

    def _generate_batch(self, rows: list[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        """The responses of one batch; `state` holds the rows that are still worked on."""
        N, M = len(rows), params.max_tokens
        stop_ids = torch.tensor(self.stop_ids, device=self.device)
        prompts = [prompt for prompt, _, _ in rows]
        width = max(len(prompt.token_ids) for prompt in prompts)
        layer: Any = partial(InPlaceLayer, width + M)
        cache = Cache(layer_class_to_replicate=layer)
        logits, state = self._prefill(prompts, cache, M)
        uniforms = [np.random.default_rng([*params.seed, g, k]).random(M) for _, g, k in rows]
        state |= {
            "row": torch.arange(N, device=self.device),
            "greedy": torch.tensor([k == params.n for _, _, k in rows], device=self.device),
            "uniforms": torch.as_tensor(np.stack(uniforms), device=self.device),
            "tokens": torch.zeros(N, M, dtype=torch.int64, device=self.device),
            "log_probs": torch.zeros(N, M, device=self.device),
            "length": torch.zeros(N, dtype=torch.int64, device=self.device),  # 0: unfinished
        }
        for t in range(M):
            if self.stopped:
                return
            tokens, log_probs = sample(logits, state["uniforms"][:, t], params)
            if params.greedy:
                best = sample(logits, state["uniforms"][:, t], replace(params, temperature=0))
                tokens = torch.where(state["greedy"], best[0], tokens)
                log_probs = torch.where(state["greedy"], best[1], log_probs)
            state["tokens"][:, t], state["log_probs"][:, t] = tokens, log_probs
            ended = (torch.isin(tokens, stop_ids) & (not params.ignore_eos)) | (t + 1 == M)
            state["length"][ended & (state["length"] == 0)] = t + 1
            unfinished = state["length"] == 0
            if unfinished.sum() <= KEEP_SHARE * len(tokens):
                names = ("row", "length", "tokens", "log_probs")
                columns = [state[name][~unfinished].cpu().numpy() for name in names]
                yield SampleBatch(
                    self.to_sample(rows[row], ids[:length], values[:length])
                    for row, length, ids, values in zip(*columns, strict=True)
                )
                keep = unfinished.nonzero()[:, 0]
                if not len(keep):
                    return
                state = {name: value[keep] for name, value in state.items()}
                cache.batch_select_indices(keep)
            padded = state["prompt_length"].min() < width
            mask = state["mask"][:, : width + t + 1] if padded else None
            positions = (state["prompt_length"] + t)[:, None]
            logits = self._forward(state["tokens"][:, t : t + 1], mask, positions, cache)

    def _prefill(
        self, prompts: list[Prompt], cache: Cache, max_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads each distinct prompt once, padded on the left, and repeats what comes of it: next
        logits [B, V]; `mask` of the cache's tokens [B, P + max_tokens] and `prompt_length` [B]."""
        distinct = {id(p): p for p in prompts}
        ragged = [torch.tensor(p.token_ids) for p in distinct.values()]
        ids = pad_sequence(ragged, batch_first=True, padding_side="left").to(self.device)
        lengths = torch.tensor([len(tokens) for tokens in ragged], device=self.device)
        P = ids.shape[1]
        positions = torch.arange(P + max_tokens, device=self.device) - (P - lengths)[:, None]
        mask = positions >= 0  # the others are padding
        logits = self._forward(ids, mask[:, :P], positions[:, :P].clamp(min=0), cache)
        order = {key: i for i, key in enumerate(distinct)}
        repeat = torch.tensor([order[id(p)] for p in prompts], device=self.device)
        cache.batch_select_indices(repeat)
        return logits[repeat], {"mask": mask[repeat], "prompt_length": lengths[repeat]}

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """The next token's logits of the tokenizer's vocabulary, [B, V]."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1, : self.vocabulary_size]


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draws a token per row of `logits`, [B, V], by inverting its distribution function at
    `uniforms`, in [0, 1), [B]. Returns tokens and their log-probabilities after temperature, top-k
    and top-p, [B]; at temperature 0 the most probable ones, and their log-probabilities at 1."""
    logits = logits.float()
    if params.temperature == 0:
        log_probs, tokens = logits.log_softmax(-1).max(-1)
        return tokens, log_probs
    logits = logits / params.temperature
    unread: Any = None  # the tokens before
    if params.top_k > 0:
        logits = TopKLogitsWarper(params.top_k)(unread, logits)
    if params.top_p < 1:
        logits = TopPLogitsWarper(params.top_p)(unread, logits)
    all_log_probs = logits.log_softmax(-1)
    cumulative = all_log_probs.exp().double().cumsum(-1)
    wanted = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], all_log_probs.gather(-1, tokens)[:, 0]
