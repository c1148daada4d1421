"""The compiled decoding step of the `hf` engine draws what the plain one draws."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import make_tiny_model, needs_onednn
from tests.models.families import FAMILIES, make_family
from tests.rollout import test_hf
from tests.rollout.test_hf import chunk, generate, make_prompts
from verl.models.compiled import of_a_call
from verl.models.kv_cache import attend
from verl.protocol import Sample
from verl.rollout.engine import SamplingParams
from verl.rollout.hf import HFEngine
from verl.utils.device import compiler_available

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")


build = partial(test_hf.build, max_num_seqs=12)


def responses(engine: HFEngine) -> list[Sample]:
    """To prompts so unlike that they are several parts of the cache, more responses than there are
    places, until one is left."""
    params, prompts = SamplingParams(4, 40, seed=(3,)), make_prompts([3, 14, 90, 6, 2])
    found = generate(engine, prompts, params)
    return sorted(found, key=lambda s: (s.group, s.response_index))


def graphs() -> int:
    """How many torch has made since its counters were reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_equal(found: list[Sample], expected: list[Sample]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        np.testing.assert_allclose(one.rollout_log_probs, other.rollout_log_probs, atol=2e-5)


@pytest.mark.series(1)
@pytest.mark.parametrize("family", ["Qwen2", "Ministral", "Gemma 2", "GPT-2", "Mixtral"])
def test_a_compiled_step_is_the_models(family: str, tmp_path: Path) -> None:
    """One graph for all sizes: with windows, capped scores, experts, a table of positions."""
    folder = make_family(family, tmp_path)
    expected = responses(build(folder, compiled=False))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = responses(build(folder, compiled=True))
    assert_equal(found, expected)
    assert graphs() == 1


def test_a_graph_is_for_sizes_that_it_fits() -> None:
    """Most of torch's checks are left out, not these."""

    def step(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids + 1 if mask.shape[1] > 8 else ids

    options = {"guard_filter_fn": of_a_call}
    graph = torch.compile(step, dynamic=True, fullgraph=True, options=options)
    for width, expected in ((3, 0), (5, 0), (9, 1), (12, 1), (4, 0)):
        assert graph(torch.zeros(2, 1), torch.zeros(2, width)).tolist() == [[expected]] * 2


@needs_onednn
def test_a_compiled_step_has_the_new_weights(tmp_path: Path) -> None:
    """Also those with reordered copies: queries, keys and values together, and the head."""
    shape = dict(hidden_size=256, vocab_size=1024)
    first = make_tiny_model(tmp_path / "first", **shape)
    other = make_tiny_model(tmp_path / "other", **shape, initializer_range=0.2)
    engine, plain = build(first, compiled=True), build(other, compiled=False)
    before = responses(engine)
    torch._dynamo.utils.counters.clear()
    assert engine.linears
    engine.start_update()
    for name, value in AutoModelForCausalLM.from_pretrained(other).named_parameters():
        engine.load_weights(chunk(name, value))
    engine.finish_update(1)
    assert_equal(after := responses(engine), responses(plain))
    assert [s.response_ids.tolist() for s in before] != [s.response_ids.tolist() for s in after]
    assert graphs() == 0


@needs_onednn
def test_two_models_of_a_process_have_graphs_of_their_own(tmp_path: Path) -> None:
    """Also where they have the same shapes: the products are not the model's arguments."""
    shape = dict(hidden_size=256, vocab_size=1024)
    folders = [make_tiny_model(tmp_path / "first", **shape), make_tiny_model(tmp_path / "small")]
    folders += [make_tiny_model(tmp_path / "other", **shape, initializer_range=0.2)]
    engines = [build(folder, compiled=True) for folder in folders]
    for engine, folder in zip(engines, folders, strict=True):
        assert_equal(responses(engine), responses(build(folder, compiled=False)))


def test_a_wrong_graph_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that mixes up its rows."""

    def backwards(*given: Any, **kw: Any) -> torch.Tensor:
        return attend(*given, **kw).flip(0)

    monkeypatch.setattr("verl.models.kv_cache.attend", backwards)
    with pytest.raises(ValueError, match="its logits differ"):
        build(make_tiny_model(tmp_path, initializer_range=0.2), compiled=True)


def test_nothing_is_held_between_generations(tmp_path: Path) -> None:
    engine, caches = build(make_tiny_model(tmp_path), compiled=True), []

    def watched(*inputs: Any) -> torch.Tensor:
        caches.append(weakref.ref(inputs[-1]))
        return step(*inputs)

    step, engine.step = engine.step, watched
    params = SamplingParams(2, 10, ignore_eos=True)
    assert len(generate(engine, make_prompts([3, 5]), params)) == 4
    assert caches and all(cache() is None for cache in caches)


LONG = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    "kind, overrides, why",
    [
        ("Bloom", FAMILIES["BLOOM"][1], "its attention is not transformers' sdpa"),
        ("Llama", {"rope_parameters": LONG}, "Data-dependent branching"),
    ],
)
def test_what_can_not_be_compiled_is_an_error(
    kind: str, overrides: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """An attention of its own, and angles that depend on the longest row."""
    folder = make_tiny_model(tmp_path, kind, **overrides)
    with pytest.raises(ValueError, match=rf"enforce_eager=False, .* \({why}.*\); set it"):
        build(folder, compiled=True)


def test_a_missing_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(ValueError, match=r"enforce_eager=False, .*no C\+\+ compiler: apt-get"):
        build(make_tiny_model(tmp_path), compiled=True)
