"""The `hf` engine: what it draws, its log-probabilities, and that nothing else matters."""

from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.helpers import VOCABULARY, make_tiny_model, needs_onednn
from verl.config.schema import ModelConfig, RolloutConfig
from verl.models.kv_cache import MAX_PARTS, RaggedCache, decode_attention, next_logits
from verl.models.linears import join_linears
from verl.protocol import Prompt, Sample, SampleBatch, WeightChunk
from verl.rollout.engine import Row, SamplingParams, rows_of
from verl.rollout.hf import HFEngine, of_like_length, sample


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> HFEngine:
    return build(tiny_model)


def build(folder: Path, max_num_seqs: int = 1024, compiled: bool = False) -> HFEngine:
    rollout = RolloutConfig(max_num_seqs=max_num_seqs, enforce_eager=not compiled)
    engine = HFEngine()
    engine.build(ModelConfig(path=str(folder)), rollout, "cpu", 100)
    return engine


def make_prompts(lengths: list[int]) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(i, rng.integers(3, 100, n), "countdown", {}) for i, n in enumerate(lengths)]


def generate(engine: HFEngine, prompts: list[Prompt], params: SamplingParams) -> list[Sample]:
    samples = engine.generate_all(prompts, list(range(len(prompts))), params)
    return sorted(samples, key=lambda s: s.group)


def chunk(name: str, value: torch.Tensor) -> WeightChunk:
    return WeightChunk([name], "float32", [list(value.shape)], [value])


def plain_log_probs(folder: Path, s: Sample, temperature: float) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
    start = len(s.prompt.token_ids) - 1
    with torch.no_grad():
        logits = model(ids).logits[0, start : start + s.length, : len(VOCABULARY)] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_plain_model(
    engine: HFEngine, tiny_model: Path, temperature: float
) -> None:
    samples = generate(engine, make_prompts([3, 9, 5]), SamplingParams(4, 40, temperature))
    assert len(samples) == 12 and len({s.length for s in samples}) > 1
    for s in samples:
        assert s.rollout_log_probs is not None and len(s.rollout_log_probs) == s.length
        expected = plain_log_probs(tiny_model, s, temperature)
        np.testing.assert_allclose(s.rollout_log_probs, expected, atol=1e-4)


def test_a_greedy_response_beside_sampled_ones(engine: HFEngine) -> None:
    """As each is without the other."""
    prompts, drawing = make_prompts([3, 9, 5]), {"max_tokens": 40, "top_k": 30, "seed": (5,)}
    together = generate(engine, prompts, SamplingParams(2, greedy=True, **drawing))
    sampled = generate(engine, prompts, SamplingParams(2, **drawing))
    greedy = generate(engine, prompts, SamplingParams(1, temperature=0, **drawing))
    together.sort(key=lambda s: (s.group, s.response_index))
    assert [s.response_index for s in together] == [0, 1, 2] * 3
    others = {(s.group, s.response_index): s for s in sampled} | {(s.group, 2): s for s in greedy}
    for s in together:
        alone = others[s.group, s.response_index]
        np.testing.assert_array_equal(s.response_ids, alone.response_ids)
        np.testing.assert_allclose(s.rollout_log_probs, alone.rollout_log_probs, atol=1e-5)


def test_only_short_prompts_are_left(engine: HFEngine, tiny_model: Path) -> None:
    """Rows that were padded stay padded when the longest prompts are finished."""
    for seed in range(6):
        params = SamplingParams(2, 60, seed=(seed,))
        for s in generate(engine, make_prompts([3, 14]), params):
            np.testing.assert_allclose(
                s.rollout_log_probs, plain_log_probs(tiny_model, s, 1.0), atol=1e-4
            )


def test_a_window_of_attention_and_shared_keys(tmp_path: Path) -> None:
    """Padded rows, four query heads to a key-value head, and tokens that get out of sight."""
    shape = dict(num_attention_heads=4, num_key_value_heads=1, sliding_window=8)
    folder = make_tiny_model(tmp_path, "Mistral", **shape)
    for s in generate(build(folder), make_prompts([3, 14, 6]), SamplingParams(2, 30)):
        np.testing.assert_allclose(s.rollout_log_probs, plain_log_probs(folder, s, 1.0), atol=1e-4)


def test_positions_do_not_run_out(tmp_path: Path) -> None:
    """GPT-2 has a table of them. A response that ends in its last one stays in the batch while
    others, which are shorter, go on."""
    folder = make_tiny_model(tmp_path, "GPT2", max_position_embeddings=60)
    engine, prompts = build(folder), make_prompts([40, *[3] * 7])
    (begun,) = engine.generate_all(prompts[:1], [0], SamplingParams(1, 10, ignore_eos=True))
    rows = [
        row._replace(begun=begun if row.group == 0 else None)
        for row in rows_of(prompts, range(8), 1)
    ]
    samples = [*chain(*engine.generate_rows(rows, SamplingParams(1, 20, ignore_eos=True)))]
    assert [s.length for s in samples] == [20] * 8
    for s in samples:
        np.testing.assert_allclose(s.rollout_log_probs, plain_log_probs(folder, s, 1.0), atol=1e-4)


def test_attention_to_parts_is_that_to_each_row() -> None:
    """Two rows with five columns, one with three; what isn't seen is masked in either way."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    seen = torch.rand(3, 1, 1, 5) < 0.7
    seen[..., -1], seen[2, ..., :2] = True, False
    expected, _ = decode_attention(torch.nn.Module(), query, key, value, seen)
    parts = [(x[:2], x[2:, :, 2:]) for x in (key, value)]
    for dtype in (torch.float32, torch.bfloat16):
        added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        q, (k, v) = query.to(dtype), [[x.to(dtype) for x in pair] for pair in parts]
        output, _ = decode_attention(torch.nn.Module(), q, k, v, added)
        tolerance = 1e-6 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


def test_the_last_rows_take_the_places_of_those_that_are_gone() -> None:
    """Of two parts, with five and three rows of four columns. In the first one, of which more than
    three quarters are left, all others stay where they are."""
    caches = [RaggedCache(limit=100, max_parts=2) for _ in range(2)]
    for part, rows in zip(caches, (range(5), range(5, 8)), strict=True):
        content = torch.tensor([[10.0 * row + column for column in range(4)] for row in rows])
        part.update(content[:, None, :, None], -content[:, None, :, None], 0)
    cache = caches[0]
    cache.join(caches[1])
    (layer,) = cache.layers
    before = [part.buffers[0].data_ptr() for part in layer.parts]
    assert cache.keep([1, 2, 3, 4, 6, 7], [3, 1, 2, 3, 2, 1]) == [4, 1, 2, 3, 7, 6]
    after = [part.buffers[0].data_ptr() for part in layer.parts]
    assert after[0] == before[0] and after[1] != before[1]
    for _ in range(40):  # beyond the columns to spare
        new = torch.full((6, 1, 1, 1), 0.5)
        (keys, _), (values, _) = layer.update(new, -new)
    first, second = (part.views[0][:, 0, :, 0] for part in layer.parts)
    assert first[:, :3].tolist() == [[10.0 * row + c for c in (1, 2, 3)] for row in (4, 1, 2, 3)]
    assert second[:, :2].tolist() == [[10.0 * row + c for c in (2, 3)] for row in (7, 6)]
    assert first.shape == (4, 43) and second.shape == (2, 42) and (first[:, 3:] == 0.5).all()
    assert (values == -keys).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_attention_is_that_of_repeated_keys(per_head: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    mask = torch.rand(3, 6 if per_head else 1, 1, 5) < 0.7
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    output, _ = decode_attention(module, query, key, value, mask, scaling=0.5)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    again, _ = decode_attention(module, query, key, value, added, scaling=0.5)
    torch.testing.assert_close(again, output)
    for row in range(3):
        for head in range(6):
            scores = 0.5 * key[row, head // 3] @ query[row, head, 0]
            scores[~mask[row, head if per_head else 0, 0]] = -torch.inf
            expected = scores.softmax(0) @ value[row, head // 3]
            torch.testing.assert_close(output[row, 0, head], expected)


def test_greedy_is_transformers_greedy(engine: HFEngine, tiny_model: Path) -> None:
    prompts = make_prompts([4, 7, 2])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for s in generate(engine, prompts, SamplingParams(1, 20, temperature=0)):
        ids = torch.tensor(s.prompt.token_ids)[None]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert s.response_ids.tolist() == out[0, ids.shape[1] :].tolist()


def test_ends_and_limits(engine: HFEngine) -> None:
    samples = generate(engine, make_prompts([3] * 8), SamplingParams(8, 60))
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        ends = np.flatnonzero(s.response_ids == 0)
        if s.finish_reason == "stop":
            assert ends.tolist() == [s.length - 1]
        else:
            assert s.length == 60 and not len(ends)


def test_end_token_in_the_last_place_is_not_truncation(engine: HFEngine) -> None:
    full = generate(engine, make_prompts([3] * 8), SamplingParams(8, 60))
    length = next(s.length for s in full if s.finish_reason == "stop" and s.length > 1)
    short = generate(engine, make_prompts([3] * 8), SamplingParams(8, length))
    at_limit = [s for s in short if s.length == length]
    assert {s.finish_reason for s in at_limit} == {"stop", "length"}


def test_ignore_eos_goes_on_to_the_limit(engine: HFEngine) -> None:
    samples = generate(engine, make_prompts([3] * 4), SamplingParams(8, 30, ignore_eos=True))
    assert {s.length for s in samples} == {30}


def test_company_does_not_matter(engine: HFEngine, tiny_model: Path) -> None:
    """The same draws alone, in small batches, and for a prompt that comes twice."""
    prompts = make_prompts([3, 9, 5, 4, 6])
    params = SamplingParams(3, 40, seed=(7, 1))
    together = generate(engine, prompts, params)
    apart = generate(build(tiny_model, max_num_seqs=4), prompts, params)
    key = sorted((s.group, s.response_ids.tolist()) for s in together)
    assert key == sorted((s.group, s.response_ids.tolist()) for s in apart)
    other_seed = generate(engine, prompts, SamplingParams(3, 40, seed=(7, 2)))
    assert key != sorted((s.group, s.response_ids.tolist()) for s in other_seed)
    alone = engine.generate_all([prompts[2]], [2], params)
    mine = sorted(s.response_ids.tolist() for s in alone)
    assert mine == sorted(s.response_ids.tolist() for s in together if s.group == 2)


def test_type_and_largest_batch_are_those_of_the_keys(tiny_model: Path) -> None:
    engine, rows = HFEngine(), list[int]()
    rollout = RolloutConfig(max_num_seqs=4, dtype="bfloat16")
    engine.build(ModelConfig(path=str(tiny_model)), rollout, "cpu", 100)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    engine.model.register_forward_pre_hook(
        lambda _, args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    assert len(generate(engine, make_prompts([3, 9]), SamplingParams(5, 10))) == 10
    assert max(rows) == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=needs_onednn)])
def test_new_weights_are_used(tmp_path: Path, large: bool, tied: bool) -> None:
    """Also those of large layers, of which there are reordered copies."""
    shape = dict(vocab_size=2048, intermediate_size=4096) if large else {}
    shape["tie_word_embeddings"] = tied
    first = make_tiny_model(tmp_path / "first", **shape)
    other = make_tiny_model(tmp_path / "other", **shape, initializer_range=0.2)
    engine = build(first)
    for layer in (engine.model.model.layers[1].mlp.down_proj, engine.model.lm_head):
        assert ("forward" in vars(layer)) == large
    params, prompts = SamplingParams(2, 20), make_prompts([4, 4])
    before = generate(engine, prompts, params)
    for s in before:
        np.testing.assert_allclose(s.rollout_log_probs, plain_log_probs(first, s, 1.0), atol=1e-4)
    weights = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    engine.start_update()
    for name, value in weights.items():
        engine.load_weights(chunk(name, value))
    engine.finish_update(1)
    after = generate(engine, prompts, params)
    assert [s.response_ids.tolist() for s in before] != [s.response_ids.tolist() for s in after]
    for s in after:
        np.testing.assert_allclose(s.rollout_log_probs, plain_log_probs(other, s, 1.0), atol=1e-4)
    with pytest.raises(KeyError, match="no such weight"):
        engine.load_weights(chunk("no such weight", torch.zeros(1)))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_reordered_products_are_the_plain_ones(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(384, 512, bias), torch.nn.Linear(512, 8, bias))
    rows = [torch.randn(n, 3, 384) for n in (1, 16, 100)]
    with torch.inference_mode():
        expected = [model(x) for x in rows]
        (joint,) = join_linears(model)
        assert ["forward" in vars(layer) for layer in model] == [True, False]  # the second is small
        for x, y in zip(rows, expected, strict=True):
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        model[0].weight *= 2
        joint.reorder()
        plain = F.linear(rows[0], model[0].weight, model[0].bias)
        torch.testing.assert_close(model[0](rows[0]), plain, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_layers_of_one_input_are_one_product(biases: tuple[bool, ...]) -> None:
    """Too small one by one; whatever they are asked, in whatever order. With a bias in some of them
    alone they stay apart."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    sizes = zip((256, 128, 128), biases, strict=True)
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(256, *size) for name, size in zip(names, sizes, strict=True)}
    )
    x, other = torch.randn(2, 5, 3, 256)
    calls = [("q_proj", x), ("k_proj", x), ("v_proj", x), ("k_proj", x), ("k_proj", x)]
    calls += [("q_proj", other), ("v_proj", x), ("v_proj", other), ("k_proj", other)]
    with torch.inference_mode():
        expected = [model[name](rows) for name, rows in calls]
        joint = join_linears(model)
        assert [len(j.layers) for j in joint] == ([3] if len({*biases}) == 1 else [])
        for (name, rows), y in zip(calls, expected, strict=True):
            torch.testing.assert_close(model[name](rows), y, rtol=1e-5, atol=1e-5)
        for name in names if joint else ():
            model[name](x)
    assert all(j.input is None and not j.outputs for j in joint)  # nothing is held


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().repeat(40_000, 1)
    uniforms = (torch.arange(40_000) + 0.5).double() / 40_000
    tokens, log_probs = sample(logits, uniforms, SamplingParams(1, 1))
    assert torch.bincount(tokens).tolist() == [4000, 20000, 10000, 6000]
    torch.testing.assert_close(log_probs, logits[0][tokens])


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().repeat(1000, 1)
    uniforms = (torch.arange(1000) + 0.5).double() / 1000
    tokens, log_probs = sample(logits, uniforms, SamplingParams(1, 1, top_k=2))
    assert set(tokens.tolist()) == {1, 2}
    assert log_probs[tokens == 2][0].exp().item() == pytest.approx(1 / 3)
    tokens, log_probs = sample(logits, uniforms, SamplingParams(1, 1, top_p=0.8))
    assert set(tokens.tolist()) == {1, 2, 3}  # 0.5 + 0.25 < 0.8: the third one still counts
    assert log_probs[tokens == 3][0].exp().item() == pytest.approx(0.15 / 0.9)
    tokens, _ = sample(logits, uniforms, SamplingParams(1, 1, top_p=0.01))
    assert set(tokens.tolist()) == {1}
    cold, _ = sample(logits, uniforms, SamplingParams(1, 1, temperature=0.5))
    share = (cold == 1).double().mean().item()
    assert share == pytest.approx(0.25 / (0.01 + 0.25 + 0.0625 + 0.0225), abs=0.002)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.zeros(2, len(VOCABULARY))
    logits[:, 0] = logits[:, -1] = -torch.inf
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample(logits, uniforms, SamplingParams(1, 1))
    assert tokens.tolist() == [1, len(VOCABULARY) - 2]


def test_a_stop_ends_what_runs_and_not_what_comes_after(engine: HFEngine) -> None:
    prompts, params = make_prompts([3, 9, 5]), SamplingParams(4, 40)
    whole = generate(engine, prompts, params)
    stream = engine.generate(prompts, [0, 1, 2], params)
    first = next(stream)
    engine.stop()
    rest = [s for samples in stream for s in samples]
    assert len(whole) == 12 and any(s.finish_reason == "unfinished" for s in rest)
    assert len(first) + len(rest) <= 12
    assert len(generate(engine, prompts, params)) == 12


def some_tokens(engine: HFEngine, rows: list[Row], params: SamplingParams, n: int) -> list[Sample]:
    """What a generation that is stopped after n tokens yields."""
    draw, drawn = engine._draw, []

    def stopping(*args: Any) -> None:
        draw(*args)
        drawn.append(1)
        engine.stopped = len(drawn) == n

    engine._draw = stopping
    found = [s for samples in engine.generate_rows(rows, params) for s in samples]
    engine._draw = draw
    return found


def test_what_is_read_together_is_of_like_length() -> None:
    """At most twice as long as the shortest, or 64 tokens longer."""
    lengths = [300, 70, 10, 141, 140, 74, 75]
    rows = rows_of(make_prompts(lengths), range(7), 1)
    parts = [[row.num_tokens for row in part] for part in of_like_length(rows)]
    assert parts == [[10, 70, 74], [75, 140, 141], [300]]


@pytest.mark.parametrize("padding", [64, 0])
def test_what_was_begun_goes_on_as_if_nothing_had_stopped_it(
    engine: HFEngine, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows of other lengths are read apart."""
    prompts, params = make_prompts([3, 30, 5]), SamplingParams(4, 40, greedy=True)
    rows, found = rows_of(prompts, range(3), 5), {}
    whole = {(s.group, s.response_index): s for s in engine.generate_all(prompts, range(3), params)}
    monkeypatch.setattr("verl.rollout.hf.FREE_PADDING", padding)
    for version in range(6):
        engine.finish_update(version)
        found |= {(s.group, s.response_index): s for s in some_tokens(engine, rows, params, 7)}
        rows = [row._replace(begun=found[row.group, row.number]) for row in rows]
        rows = [row for row in rows if row.begun.finish_reason == "unfinished"]
    engine.finish_update(0)
    assert not rows and found.keys() == whole.keys() and len(found) == 15
    for name, s in found.items():
        assert s.response_ids.tolist() == whole[name].response_ids.tolist()
        log_probs = whole[name].rollout_log_probs
        np.testing.assert_allclose(s.rollout_log_probs, log_probs, rtol=0, atol=1e-5)
        assert s.finish_reason == whole[name].finish_reason
        assert s.versions.tolist() == [i // 7 for i in range(s.length)]


def test_each_token_knows_the_weights_that_drew_it(tiny_model: Path) -> None:
    """Greedy tokens of a model that says 7 or 8 whatever it reads, and then 20 or 21."""
    engine, params = build(tiny_model), SamplingParams(2, 30, temperature=0, ignore_eos=True)
    rows = rows_of(make_prompts([3, 5]), [0, 1], 2)
    weights = dict(engine.model.named_parameters())["model.embed_tokens.weight"]

    def always(token: int, version: int) -> None:
        changed = torch.full_like(weights, 0.01)
        changed[token], changed[token + 1] = 1.0, -1.0
        engine.load_weights(chunk("model.embed_tokens.weight", changed))
        engine.finish_update(version)

    always(7, 3)
    first = {(s.group, s.response_index): s for s in some_tokens(engine, rows, params, 11)}
    assert {s.length for s in first.values()} == {11}
    always(20, 4)
    rows = [row._replace(begun=first[row.group, row.number]) for row in rows]
    whole = some_tokens(engine, rows, params, 100)
    assert len(whole) == 4
    for s in whole:
        assert {*s.response_ids[:11]} <= {7, 8} and {*s.response_ids[11:]} <= {20, 21}
        assert s.versions.tolist() == [3] * 11 + [4] * 19


@pytest.mark.parametrize("parts", [8, 2, 1])
def test_responses_that_wait_take_the_places_of_those_that_ended(
    tiny_model: Path, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = make_prompts([3, 9, 5, 17, 2]), SamplingParams(5, 40)
    expected = {
        (s.group, s.response_index): s for s in generate(build(tiny_model), prompts, params)
    }
    engine = build(tiny_model, max_num_seqs=4)
    assert engine.max_parts == MAX_PARTS
    engine.max_parts = parts
    sizes, most, widest = [], 0, 0

    def watched(model: Any, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        nonlocal most, widest
        sizes.append(tuple(ids.shape))
        most = max(most, *(len(layer.parts) for layer in others[-1].layers), 0)
        widest = max(widest, others[-1].get_seq_length())
        return next_logits(model, ids, *others)

    monkeypatch.setattr("verl.rollout.hf.next_logits", watched)
    engine.step = partial(watched, engine.model)
    for s in generate(engine, prompts, params):
        whole = expected.pop((s.group, s.response_index))
        assert s.response_ids.tolist() == whole.response_ids.tolist()
        log_probs = whole.rollout_log_probs
        np.testing.assert_allclose(s.rollout_log_probs, log_probs, rtol=0, atol=1e-5)
    assert not expected and max(batch for batch, _ in sizes) == 4
    assert most == min(parts, 4) and widest < 17 + 40  # no wider than the longest row
    # A place is empty in no more than the one pass before it is taken, as long as anybody waits.
    last = max(i for i, (_, width) in enumerate(sizes) if width > 1)
    decoding = [batch for batch, width in sizes[:last] if width == 1]
    assert len(decoding) > 100 and all(4 in pair for pair in pairwise(decoding))


@pytest.mark.parametrize("pause, fewest, most", [(0.0, 4, 24), (1e9, 2, 2)])
def test_what_is_finished_travels_in_few_messages(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch, pause: float, fewest: int, most: int
) -> None:
    """The first at once, what follows within `GATHER_S` together."""
    monkeypatch.setattr("verl.rollout.engine.GATHER_S", pause)
    params = SamplingParams(8, 200)
    for _ in range(2):
        messages = list(engine.generate(make_prompts([3, 9, 5]), [0, 1, 2], params))
        assert fewest <= len(messages) <= most and sum(map(len, messages)) == 24
        assert all(type(message) is SampleBatch and message for message in messages)


def test_a_stop_without_a_generation_ends_none(engine: HFEngine) -> None:
    engine.stop()
    assert len(generate(engine, make_prompts([3, 9]), SamplingParams(2, 40))) == 4


def test_samples_know_the_version_of_their_policy(engine: HFEngine) -> None:
    prompts, params = make_prompts([3]), SamplingParams(2, 5)
    engine.finish_update(4)
    assert {s.policy_version for s in engine.generate_all(prompts, [0], params)} == {4}
    engine.finish_update(0)
