"""Batched sampling for any Hugging Face causal model, on CPU and GPU. A prompt is read once for all
its responses, finished ones make room for those that wait, the KV cache is written in place."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from verl.config.schema import ModelConfig, RolloutConfig
from verl.models.compiled import CompiledStep
from verl.models.folder import skeleton
from verl.models.guard import other_layers
from verl.models.hf import load_hf_model, stop_token_ids, vocabulary_size
from verl.models.kv_cache import DECODE_ATTENTION, RaggedCache, max_parts, next_logits
from verl.models.linears import join_linears
from verl.protocol import Sample, SampleBatch, WeightChunk
from verl.rollout.engine import RolloutEngine, Row, SamplingParams
from verl.utils.device import default_dtype, empty_cache, get_device

KEEP_SHARE = 0.95  # the batch is compacted when a smaller share of its rows is unfinished
FILL_SHARE = 0.15  # share of the places that must be free before waiting responses take them
FREE_PADDING = 64  # columns in front of a shorter row that don't matter


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
        self.max_parts = max_parts(self.model)
        self.linears = join_linears(self.model)
        self.step: Callable[..., Tensor] = partial(next_logits, self.model)
        if not rollout.enforce_eager:
            self.step = CompiledStep(self.model, self.max_parts)
        self.stop_ids, self.vocabulary_size = stop_token_ids(model), vocabulary_size(model)
        self.stop_tokens = torch.tensor(self.stop_ids, device=self.device)

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
        for linear in self.linears:
            linear.reorder()
        super().finish_update(version)

    def sleep(self) -> None:
        """Moves the weights to host memory."""
        self.model.to("cpu")
        empty_cache(self.device)

    @torch.inference_mode()
    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        """See `RolloutEngine.generate_rows`. At most `max_num_seqs` responses are a batch; those
        that wait take the places of those that have ended."""
        self.stopped, self.sent, waiting, done = False, -math.inf, deque(rows), SampleBatch([])
        batch: Batch | None = None
        while (waiting or batch) and not self.stopped:
            if batch:
                batch.logits = self.step(*batch.read_last())
            places = self.max_num_seqs - (len(batch.rows) if batch else 0)
            if waiting and places >= FILL_SHARE * self.max_num_seqs:
                chosen = [waiting.popleft() for _ in range(min(places, len(waiting)))]
                read = [self._prefill(part, params) for part in of_like_length(chosen)]
                begun = reduce(Batch.join, read)
                batch = batch.join(begun) if batch else begun
            assert batch is not None
            self._draw(batch, params)
            ended = batch.state["length"] > 0
            new = ended & ~batch.state["sent"]
            compact = bool(ended.sum() >= (1 - KEEP_SHARE) * len(ended))
            send = bool(done or new.any()) and self.may_send()
            if send or compact:
                done += self._responses(batch, new)
                batch.state["sent"] = ended
            if send:
                yield done
                done = SampleBatch([])
            if compact:
                batch = batch.keep(~ended)
        if batch:
            done += self._responses(batch, ~batch.state["sent"])
        if done:
            yield done

    def _prefill(self, rows: list[Row], params: SamplingParams) -> "Batch":
        """Reads what the responses follow, each distinct prompt once."""
        M, to = params.max_tokens, partial(torch.as_tensor, device=self.device)
        keys = [id(row.prompt if row.begun is None else row) for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        ragged = [torch.tensor(row.token_ids) for row in distinct.values()]
        ids = pad_sequence(ragged, batch_first=True, padding_side="left").to(self.device)
        width, lengths = ids.shape[1], to([len(tokens) for tokens in ragged])
        positions = torch.arange(width, device=self.device) - (width - lengths)[:, None]
        cache = RaggedCache(width + M, self.max_parts)
        logits = next_logits(self.model, ids, positions >= 0, positions.clamp(min=0), cache)
        order = {key: i for i, key in enumerate(distinct)}
        repeat = to([order[key] for key in keys])
        cache.repeat(repeat)
        seeds, N = [[*params.seed, row.group, row.number] for row in rows], len(rows)
        # The last column is for what a response draws between its end and that of the batch.
        state = {
            "greedy": to([row.number == params.n for row in rows]),
            "uniforms": to(np.stack([np.random.default_rng(s).random(M + 1) for s in seeds])),
            "tokens": torch.zeros(N, M + 1, dtype=torch.int64, device=self.device),
            "log_probs": torch.zeros(N, M + 1, device=self.device),
            "drawn": to([row.num_begun for row in rows]),  # tokens up to now
            "length": torch.zeros(N, dtype=torch.int64, device=self.device),  # 0: unfinished
            "sent": torch.zeros(N, dtype=torch.bool, device=self.device),
            "read": lengths[repeat],  # tokens in the cache
        }
        return Batch(rows, cache, logits[repeat], state)

    def _draw(self, batch: "Batch", params: SamplingParams) -> None:
        """Appends a token to each response; notes the lengths of those that end."""
        state, at, M = batch.state, batch.state["drawn"][:, None], params.max_tokens
        uniforms = state["uniforms"].gather(1, at)[:, 0]
        logits = batch.logits[:, : self.vocabulary_size]  # a token beyond it has no text
        tokens, log_probs = sample(logits, uniforms, params)
        if params.greedy:
            best = sample(logits, uniforms, replace(params, temperature=0))
            tokens = torch.where(state["greedy"], best[0], tokens)
            log_probs = torch.where(state["greedy"], best[1], log_probs)
        state["tokens"].scatter_(1, at, tokens[:, None])
        state["log_probs"].scatter_(1, at, log_probs[:, None])
        drawn = state["drawn"] + 1
        ended = (torch.isin(tokens, self.stop_tokens) & (not params.ignore_eos)) | (drawn == M)
        state["length"][ended & (state["length"] == 0)] = drawn[ended & (state["length"] == 0)]
        state["drawn"], batch.drawn = drawn.clamp(max=M), tokens

    def _responses(self, batch: "Batch", which: Tensor) -> Iterator[Sample]:
        """These responses of the batch, [B], as far as they have come."""
        rows = [row for row, wanted in zip(batch.rows, which.tolist(), strict=True) if wanted]
        names = ("length", "drawn", "tokens", "log_probs")
        columns = [batch.state[name][which].cpu().numpy() for name in names]
        for row, length, drawn, ids, values in zip(rows, *columns, strict=True):
            if new := range(row.num_begun, length or drawn):
                yield self.to_sample(row, ids[new], values[new], bool(length))


@dataclass(slots=True)
class Batch:
    """Responses that are generated together, B of them. All end in the cache's last column."""

    rows: list[Row]
    cache: RaggedCache
    logits: Tensor  # of the next tokens, [B, V]
    state: dict[str, Tensor]  # by what it says of each response, [B, …] (`HFEngine._prefill`)
    drawn: Tensor = field(init=False)  # the last tokens, [B]

    def read_last(self) -> tuple[Tensor, Tensor | None, Tensor, Cache]:
        """Reads the last tokens: what the forward pass gets, tokens [B, 1], mask (None: no row is
        padded), positions. What a response draws after its end is anywhere, so at position 0."""
        W, read = self.cache.get_seq_length(), self.state["read"]
        columns, padding = torch.arange(W + 1, device=read.device), (W - read)[:, None]
        mask = columns >= padding if read.min() < W else None
        self.state["read"] = read + 1
        positions = read.masked_fill(self.state["length"] > 0, 0)
        return self.drawn[:, None], mask, positions[:, None], self.cache

    def keep(self, which: Tensor) -> "Batch | None":
        """Only these responses, [B]; None: there is none."""
        indices = which.nonzero()[:, 0]
        if not len(indices):
            return None
        tokens = self.state["read"][indices].tolist()
        order = self.cache.keep(indices.tolist(), tokens)
        chosen = torch.tensor(order, device=which.device)
        self.rows = [self.rows[i] for i in order]
        self.drawn = self.drawn[chosen]
        self.state = {name: value[chosen] for name, value in self.state.items()}
        return self

    def join(self, other: "Batch") -> "Batch":
        """With the responses of another batch."""
        self.cache.join(other.cache)
        names = other.state.keys()
        state = {name: torch.cat([self.state[name], other.state[name]]) for name in names}
        logits = torch.cat([self.logits, other.logits])
        return Batch(self.rows + other.rows, self.cache, logits, state)


def of_like_length(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows, those with fewer tokens first; in parts in which the longest has at most twice as
    many tokens as the shortest, or `FREE_PADDING` more, as shorter ones are padded."""
    parts: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: row.num_tokens):
        least = parts[-1][0].num_tokens if parts[-1] else row.num_tokens
        if row.num_tokens > max(2 * least, least + FREE_PADDING):
            parts.append([])
        parts[-1].append(row)
    return parts


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
