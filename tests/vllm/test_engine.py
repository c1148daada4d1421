"""The engine `vllm` against the actor's model: tokens, log-probabilities, new weights."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import VOCABULARY, make_samples, make_tiny_model
from verl.algorithms.losses import LossConfig
from verl.config.base import FSDPConfig, MixedPrecisionConfig, ModelConfig, OptimConfig
from verl.config.rollout import EngineKwargs, RolloutConfig
from verl.models.lora import merged_weight, plain_parameters
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample
from verl.rollout.engine import RolloutEngine, SamplingParams, rows_of
from verl.rollout.hf import HFEngine
from verl.rollout.vllm import VLLMEngine, environment

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("Qwen2", {}),
    "mixtral": ("Mixtral", {"tie_word_embeddings": False, "num_local_experts": 4}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {}),
}
LIMIT = MicroBatchLimit(64)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    kind, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    # Twice as many embeddings as the tokenizer has words.
    size = 2 * len(VOCABULARY)
    make_tiny_model(folder, kind, vocab_size=size, **overrides)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def engine(model: ModelConfig) -> Iterator[VLLMEngine]:
    kwargs = EngineKwargs(vllm={"block_size": 32})  # prompts of more than a block are cached
    rollout = RolloutConfig(name="vllm", max_num_seqs=24, engine_kwargs=kwargs)
    engine = VLLMEngine()
    engine.build(model, rollout, "cpu", 160)
    yield engine
    del engine.engine
    gc.collect()


@pytest.fixture(scope="module")
def actor(model: ModelConfig, engine: VLLMEngine) -> PolicyWorker:
    """One rank, in the process group that vLLM has made."""
    worker = PolicyWorker("cpu")
    worker.build(model, FSDPConfig(), OptimConfig(lr=3e-3), 10)
    return worker


def make_prompts(lengths: list[int]) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(i, rng.integers(3, 100, n), "countdown", {}) for i, n in enumerate(lengths)]


PROMPTS = make_prompts([3, 70, 5, 40])


def generate(engine: RolloutEngine, prompts: list[Prompt], params: SamplingParams) -> list[Sample]:
    samples = engine.generate_all(prompts, list(range(len(prompts))), params)
    return sorted(samples, key=lambda s: (s.group, s.response_index))


def update(actor: PolicyWorker, seed: int) -> None:
    """One optimizer step on random responses."""
    samples = make_samples([20, 30, 25, 10], seed=seed, old_log_probs=None)
    step = OptimizerStep(samples, np.full(4, 0.1, np.float32))
    actor.update([step], LossConfig(), LIMIT, 1.0)


def transfer(actor: PolicyWorker, engine: RolloutEngine) -> None:
    """Gives the engine the actor's weights in small chunks."""
    version, chunks = actor.plan_export(None, 20_000, engine.stored)
    engine.start_update()
    for chunk in chunks:
        engine.load_weights(actor.export(chunk, "host"))
    actor.finish_export()
    engine.finish_update(version)
    assert len(chunks) > 3


def weights_of(actor: PolicyWorker) -> dict[str, torch.Tensor]:
    """The actor's weights, as transformers names them."""
    return {n: p.detach().full_tensor() for n, p in actor.model.lm.named_parameters()}


def difference(actor: PolicyWorker, samples: list[Sample], temperature: float) -> float:
    """Largest difference of log-probabilities."""
    actual = actor.log_probs(samples, temperature, LIMIT)
    ours = np.concatenate([s.rollout_log_probs for s in samples])
    return float(np.abs(ours - actual).max())


def check(actor: PolicyWorker, engine: RolloutEngine, plain: torch.nn.Module) -> None:
    """Tokens and log-probabilities are those of the actor and of `plain`, with its weights."""
    for temperature in (1.0, 0.7):
        samples = generate(engine, PROMPTS, SamplingParams(4, 30, temperature))
        assert len(samples) == 16
        assert difference(actor, samples, temperature) < 1e-4
    for s in generate(engine, PROMPTS, SamplingParams(1, 30, temperature=0)):
        ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
        with torch.no_grad():
            logits = plain(ids).logits[0, len(s.prompt.token_ids) - 1 : -1, : len(VOCABULARY)]
        best, expected = logits.log_softmax(-1).max(-1)
        assert s.response_ids.tolist() == expected.tolist()
        np.testing.assert_allclose(s.rollout_log_probs, best, atol=1e-4)


def test_it_is_the_actors_model_before_and_after_updates(
    model: ModelConfig, engine: VLLMEngine, actor: PolicyWorker
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.path)
    engines: list[RolloutEngine] = [engine, HFEngine()]
    engines[1].build(model, RolloutConfig(), "cpu", 160)
    for one in engines:
        check(actor, one, plain)
    for version in range(1, 4):
        update(actor, version)
        stale = generate(engine, PROMPTS, SamplingParams(4, 30))
        assert difference(actor, stale, 1.0) > 1e-2  # an engine without the update would show
        for one in engines:
            transfer(actor, one)
            plain.load_state_dict(weights_of(actor), strict=False)
            assert one.version == version
            check(actor, one, plain)


def test_what_is_stale_would_show(
    engine: VLLMEngine, actor: PolicyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import vocab_parallel_embedding as layers

    from verl.rollout.vllm_worker import ActorWeights

    params = SamplingParams(4, 30)

    def mismatch(seed: int) -> float:
        update(actor, seed)
        generate(engine, PROMPTS, params)  # fills the prefix cache
        transfer(actor, engine)
        return difference(actor, generate(engine, PROMPTS, params), 1.0)

    assert mismatch(4) < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "reset_prefix_cache", lambda: True)
        assert mismatch(5) > 1e-3
    if engine.engine.model_config.hf_config.tie_word_embeddings:
        with monkeypatch.context() as patch:
            method = layers.UnquantizedEmbeddingMethod
            patch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
            assert mismatch(6) > 1e-3
    if engine.engine.model_config.is_moe:
        with monkeypatch.context() as patch:
            patch.delattr(ActorWeights, "start_weight_update")  # CPU kernels keep a copy of experts
            assert mismatch(7) > 1e-3
    assert mismatch(8) < 1e-4


ONE = pytest.mark.parametrize("model", ["qwen3-tied"], indirect=True)


@ONE
def test_it_gets_merged_weights_from_lora(model: ModelConfig, engine: VLLMEngine) -> None:
    actor = PolicyWorker("cpu")
    lora = replace(model, lora_rank=4)
    actor.build(lora, FSDPConfig(), OptimConfig(lr=1e-2), 10)
    plain = AutoModelForCausalLM.from_pretrained(model.path)
    for seed in range(3):
        transfer(actor, engine)
        lm = actor.model.lm
        merged = {name: merged_weight(lm, name) for name, _ in plain_parameters(lm)}
        plain.load_state_dict(merged, strict=False)
        check(actor, engine, plain)
        update(actor, seed)
        stale = generate(engine, PROMPTS, SamplingParams(4, 30))
        assert difference(actor, stale, 1.0) > 1e-2


@ONE
def test_top_k_and_top_p_are_in_the_log_probs(
    model: ModelConfig, engine: VLLMEngine, actor: PolicyWorker
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.path)
    transfer(actor, engine)
    plain.load_state_dict(weights_of(actor), strict=False)
    for params in (SamplingParams(4, 10, top_k=3), SamplingParams(4, 10, 0.7, top_p=0.5)):
        for s in generate(engine, PROMPTS, params):
            ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
            with torch.no_grad():
                logits = plain(ids).logits[0, len(s.prompt.token_ids) - 1 : -1, : len(VOCABULARY)]
            probs, order = (logits / params.temperature).softmax(-1).sort(descending=True)
            if params.top_k > 0:
                kept = torch.arange(probs.shape[-1]).expand_as(probs) < params.top_k
            else:
                kept = probs.cumsum(-1) - probs < params.top_p
            probs = torch.where(kept, probs, 0)
            probs = (probs / probs.sum(-1, keepdim=True)).gather(-1, order.argsort(-1))
            expected = probs.gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0].log()
            np.testing.assert_allclose(s.rollout_log_probs, expected, atol=1e-4)


@ONE
def test_draws_depend_on_their_seed_alone(engine: VLLMEngine) -> None:
    params = SamplingParams(3, 30, seed=(7, 1))
    together = generate(engine, PROMPTS, params)
    alone = engine.generate_all(PROMPTS[2:3], [2], params)
    assert {s.response_index for s in alone} == {0, 1, 2}
    for s in alone:
        (twin,) = [t for t in together if (t.group, t.response_index) == (2, s.response_index)]
        assert s.response_ids.tolist() == twin.response_ids.tolist()
    assert len({tuple(s.response_ids) for s in together if s.group == 2}) == 3
    other = generate(engine, PROMPTS, SamplingParams(3, 30, seed=(7, 2)))
    assert [s.response_ids.tolist() for s in together] != [s.response_ids.tolist() for s in other]


@ONE
def test_a_greedy_response_beside_sampled_ones(engine: VLLMEngine) -> None:
    together = generate(engine, PROMPTS, SamplingParams(2, 20, seed=(5,), greedy=True))
    sampled = generate(engine, PROMPTS, SamplingParams(2, 20, seed=(5,)))
    greedy = generate(engine, PROMPTS, SamplingParams(1, 20, temperature=0))
    others = {(s.group, s.response_index): s for s in sampled} | {(s.group, 2): s for s in greedy}
    assert len(together) == len(others) == 3 * len(PROMPTS)
    for s in together:
        expected = others[s.group, s.response_index].response_ids
        np.testing.assert_array_equal(s.response_ids, expected)


def test_ends_and_limits(engine: VLLMEngine) -> None:
    samples = generate(engine, make_prompts([3] * 8), SamplingParams(8, 60))  # 64 > max_num_seqs
    assert len(samples) == 64
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        ends = np.flatnonzero(s.response_ids == 0)
        assert len(s.rollout_log_probs) == s.length
        if s.finish_reason == "stop":
            assert ends.tolist() == [s.length - 1]
        else:
            assert s.length == 60 and not len(ends)
    on = generate(engine, make_prompts([3] * 4), SamplingParams(8, 30, ignore_eos=True))
    assert {s.length for s in on} == {30}
    many = generate(engine, make_prompts([3]), SamplingParams(30, 5))
    assert [s.response_index for s in many] == list(range(30))  # more than max_num_seqs


@ONE
def test_a_stop_ends_what_runs_and_not_what_comes_after(engine: VLLMEngine) -> None:
    engine.stop()
    stream = engine.generate(PROMPTS, [0, 1, 2, 3], SamplingParams(8, 60))
    first = next(stream)
    engine.stop()
    rest = [s for samples in stream for s in samples]
    assert len(first) + len(rest) <= 32 and any(s.finish_reason == "unfinished" for s in rest)
    assert not engine.engine.has_unfinished_requests()
    assert len(generate(engine, PROMPTS, SamplingParams(2, 40))) == 8


@ONE
def test_what_was_begun_goes_on_with_new_weights_and_each_token_knows_which(
    engine: VLLMEngine, actor: PolicyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(actor, 21)
    transfer(actor, engine)
    before = engine.version
    params = SamplingParams(3, 40, ignore_eos=True)
    rows, steps, step = rows_of(PROMPTS, range(4), 3), [], engine.engine.step

    def stopping() -> Any:
        steps.append(1)
        engine.stopped = len(steps) == 15
        return step()

    monkeypatch.setattr(engine.engine, "step", stopping)
    begun = [s for samples in engine.generate_rows(rows, params) for s in samples]
    assert {s.finish_reason for s in begun} == {"unfinished"} and len(begun) == 12
    assert min(s.length for s in begun) > 5 and max(s.length for s in begun) < 16
    assert difference(actor, begun, 1.0) < 1e-4
    update(actor, 22)
    transfer(actor, engine)
    known = {(s.group, s.response_index): s for s in begun}
    rows = [row._replace(begun=known[row.group, row.number]) for row in rows]
    whole = [s for samples in engine.generate_rows(rows, params) for s in samples]
    assert {s.length for s in whole} == {40} and len(whole) == 12
    actual = np.split(actor.log_probs(whole, 1.0, LIMIT), 12)  # of the new weights alone
    for s, new in zip(whole, actual, strict=True):
        n = known[s.group, s.response_index].length
        assert s.versions.tolist() == [before] * n + [before + 1] * (40 - n)
        np.testing.assert_allclose(s.rollout_log_probs[n:], new[n:], atol=1e-4)
        assert np.abs(s.rollout_log_probs[:n] - new[:n]).max() > 1e-2


@ONE
def test_logits_of_the_engine_in_float32(actor: PolicyWorker, tmp_path: Path) -> None:
    """The actor's always are."""
    make_tiny_model(tmp_path, tie_word_embeddings=False, initializer_range=0.1)
    large = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        large.lm_head.weight.mul_(4)  # the larger a logit, the coarser in bfloat16
        for name, weight in large.named_parameters():  # layers that add nothing have no noise
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    large.save_pretrained(tmp_path)
    model, exact, found = ModelConfig(path=str(tmp_path)), PolicyWorker("cpu"), []
    exact.build(model, FSDPConfig(mixed_precision=MixedPrecisionConfig("bfloat16")))
    for fp32_lm_head in (False, True):
        engine = VLLMEngine()
        rollout = RolloutConfig(
            name="vllm",
            dtype="bfloat16",
            fp32_lm_head=fp32_lm_head,
            enable_prefix_caching=fp32_lm_head,
            disable_log_stats=fp32_lm_head,
        )
        engine.build(model, rollout, "cpu", 160)
        assert (engine.engine.model_config.head_dtype == torch.float32) == fp32_lm_head
        cache = engine.engine.vllm_config.cache_config
        assert cache.enable_prefix_caching == fp32_lm_head
        assert bool(engine.engine.logger_manager) != fp32_lm_head
        samples = generate(engine, PROMPTS, SamplingParams(8, 30))
        actual = exact.log_probs(samples, 1.0, LIMIT)
        ours = np.concatenate([s.rollout_log_probs for s in samples])
        found.append(float(np.abs(ours - actual).mean()))
        del engine.engine
        gc.collect()
    assert found[1] < 0.01 * found[0], found


def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    model = ModelConfig(path=str(make_tiny_model(tmp_path)))
    rollout = RolloutConfig(name="vllm", engine_kwargs=EngineKwargs({"block_sizes": 16}))
    with pytest.raises(ValueError, match=r"vLLM: .*'block_sizes'.* one is 'block_size'"):
        VLLMEngine().build(model, rollout, "cpu", 64)


def test_vllms_warnings_are_shown_unless_others_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert environment(RolloutConfig(), 1.0, [0])["VLLM_LOGGING_LEVEL"] == "WARNING"
    shown = environment(RolloutConfig(disable_log_stats=False), 1.0, [0])
    assert shown["VLLM_LOGGING_LEVEL"] == "INFO"  # as vLLM's statistics are
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert environment(RolloutConfig(), 1.0, [0])["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_the_workers_of_a_parallel_engine_get_its_bundles() -> None:
    names = {"VLLM_RAY_PER_WORKER_GPUS": "0.5", "VLLM_RAY_BUNDLE_INDICES": "2,3"}
    rollout = RolloutConfig(tensor_model_parallel_size=2)
    assert environment(rollout, 0.5, range(2, 4)).items() >= names.items()
    assert not environment(RolloutConfig(), 0.5, [2]).keys() & names.keys()
