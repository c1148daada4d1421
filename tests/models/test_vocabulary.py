"""One tokenizer decides prompts, texts and stopping, whatever model and folder say."""

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.helpers import VOCABULARY, free_address, make_tiny_model, make_tokenizer
from verl.config.load import load_config
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.models.hf import load_tokenizer, stop_token_ids, vocabulary_size
from verl.models.logprobs import chunked_log_probs
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import Prompt, Sample
from verl.rollout.engine import SamplingParams
from verl.rollout.hf import HFEngine


def other_tokenizer(folder: Path) -> Path:
    """One that ends with the token 12."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = VOCABULARY[12]
    tokenizer.save_pretrained(folder)
    return folder


def sampled(model: ModelConfig) -> list[Sample]:
    engine = HFEngine()
    engine.build(model, RolloutConfig(), "cpu", 100)
    prompts = [Prompt(i, np.array([5, 6, 7 + i]), "countdown", {}) for i in range(3)]
    return engine.generate_all(prompts, range(3), SamplingParams(8, 40))


def test_the_key_is_followed(tmp_path: Path) -> None:
    folder, other = make_tiny_model(tmp_path / "model"), other_tokenizer(tmp_path / "tokenizer")
    for end, keys in ([0], []), ([12], [f"data.tokenizer={other}"]):
        config = load_config([*keys, f"actor_rollout_ref.model.path={folder}"])
        assert stop_token_ids(config.actor_rollout_ref.model) == end
        config = load_config([*keys, f"model.path={folder}"], "sft_trainer")
        assert stop_token_ids(config.model) == end


def test_a_tokenizer_of_its_own_decides_how_responses_end(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = ModelConfig(str(folder), tokenizer_path=str(other_tokenizer(tmp_path / "tokenizer")))
    assert stop_token_ids(ModelConfig(str(folder))) == [0]
    assert stop_token_ids(model) == [12]
    samples = sampled(model)
    assert any(not s.truncated for s in samples)
    for s in samples:
        assert 12 not in s.response_ids[:-1] and (s.response_ids[-1] == 12 or s.truncated)
    assert any(0 in s.response_ids for s in samples)


def test_a_run_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer there: name another in data\.tokenizer"):
        load_tokenizer(ModelConfig(str(folder)))
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*nowhere: no Hugging Face model"):
        load_tokenizer(ModelConfig(str(folder), tokenizer_path=str(tmp_path / "nowhere")))


def test_what_the_tokenizer_does_not_know_is_never_sampled(tmp_path: Path) -> None:
    """Rows of the embedding that only pad it; the actor gives them no probability, either."""
    size = len(VOCABULARY)
    model = ModelConfig(str(make_tiny_model(tmp_path, vocab_size=2 * size)))
    assert vocabulary_size(model) == size
    samples = sampled(model)
    assert max(int(s.response_ids.max()) for s in samples) < size
    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    try:
        worker = PolicyWorker("cpu")
        worker.build(model, FSDPConfig(), OptimConfig(), 1)
        log_probs = worker.log_probs(samples, 1.0, MicroBatchLimit(8))
    finally:
        dist.destroy_process_group()
    expected = np.concatenate([s.rollout_log_probs for s in samples])
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_log_probs_of_a_part_of_the_vocabulary() -> None:
    torch = pytest.importorskip("torch")
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 6, 1])
    results = []
    for w, size in ((weight, 7), (weight[:7], None)):
        h, w = hidden.clone().requires_grad_(), w.clone().requires_grad_()
        log_probs, entropy = chunked_log_probs(h, w, targets, 0.7, None, (2, 3), size)
        (log_probs.sum() + 2 * entropy.sum()).backward()
        results.append((log_probs, entropy, h.grad, w.grad[:7]))
        assert not w.grad[7:].any()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
