"""A reward model's scores are those of plain transformers, however the work is split."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.helpers import free_address, make_tiny_model, make_tiny_reward_model
from verl.config.base import ClassifierConfig, FSDPConfig, MixedPrecisionConfig
from verl.config.rewards import RewardModelModelConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.models.score import check_score_model
from verl.protocol import Prompt, Sample

LENGTHS = [3, 9, 1, 20, 7, 12, 2]
OWN_MODEL = """
from transformers import LlamaForSequenceClassification


class Model(LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
"""
LIMITS = [MicroBatchLimit(1), MicroBatchLimit(3), MicroBatchLimit(9), MicroBatchLimit(None, 24)]


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reward_model(tmp_path_factory.mktemp("reward"))


def conversations() -> list[Sample]:
    """Of ragged lengths, the whole of each in the prompt."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(i, rng.integers(3, 100, length), "", None) for i, length in enumerate(LENGTHS)
    ]
    return [Sample(p, p.index, np.zeros(1, np.int64), "length") for p in prompts]


def plain_scores(folder: Path) -> np.ndarray:
    """By transformers' own forward pass, one conversation at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [torch.tensor(s.prompt.token_ids)[None] for s in conversations()]
        return np.array([model(row).logits.item() for row in rows])


def build(folder: Path, packed: bool = True, fsdp: FSDPConfig | None = None) -> PolicyWorker:
    """The part of an actor rank that scores."""
    worker = PolicyWorker("cpu")
    model = ClassifierConfig(path=str(folder), use_remove_padding=packed)
    worker.build_beside("reward_model", model, fsdp or FSDPConfig())
    return worker


def scores_of(worker: PolicyWorker, samples: list[Sample], limit: MicroBatchLimit) -> np.ndarray:
    found: np.ndarray = worker.ask("reward_model", "log_probs", samples, 1.0, limit)
    return found


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_those_of_transformers(kind: str, packed: bool, tmp_path: Path) -> None:
    worker = build(make_tiny_reward_model(tmp_path, kind), packed)
    expected = plain_scores(tmp_path)
    assert np.ptp(expected) > 0.1
    for limit in LIMITS:
        found = scores_of(worker, conversations(), limit)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def _rank_scores(rank: int, world: int, address: str, folder: Path, out: Path) -> None:
    """One of `world` processes: each scores a share, and then the first one all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for packed in (True, False):
        worker = build(folder, packed)
        for i, limit in enumerate(LIMITS):
            for name, share in ("shared", rank), ("lonely", 0 if rank == 0 else len(LENGTHS)):
                step = world if name == "shared" else 1
                found = scores_of(worker, conversations()[share::step], limit)
                results[f"{packed} {i} {name}"] = torch.tensor(found)
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in test_policy.py


def test_ranks_do_not_change_the_scores(folder: Path, tmp_path: Path) -> None:
    mp.spawn(_rank_scores, (2, free_address(), folder, tmp_path), nprocs=2)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = plain_scores(folder)
    assert len(by_rank[0]) == 4 * len(LIMITS)
    for name in by_rank[0]:
        first, second = (found[name].numpy() for found in by_rank)
        both = first
        if name.endswith("shared"):
            both = np.zeros(len(LENGTHS))
            both[::2], both[1::2] = first, second
        np.testing.assert_allclose(both, expected, atol=1e-5)


def test_the_shards_settings_are_the_reward_models_own(tmp_path: Path) -> None:
    """Offloaded beside a policy that is not; computed in another type."""
    half = MixedPrecisionConfig(param_dtype="bfloat16")
    fsdp = FSDPConfig(param_offload=True, mixed_precision=half)
    folder = make_tiny_reward_model(tmp_path / "reward")
    policy = ClassifierConfig(path=str(make_tiny_reward_model(tmp_path / "policy", "Qwen2")))
    worker = PolicyWorker("cpu")
    worker.build(policy, FSDPConfig())
    worker.build_beside("reward_model", ClassifierConfig(path=str(folder)), fsdp)
    scores = [scores_of(worker, conversations(), limit) for limit in (LIMITS[0], LIMITS[0])]
    assert np.array_equal(*scores)  # also after it came back from the host
    assert 0 < np.abs(scores[0] - plain_scores(folder)).max() < 0.2
    assert worker.beside["reward_model"].host.places and not worker.host.places


def test_models_that_are_none_are_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check(path: Path, **options: Any) -> None:
        check_score_model(ClassifierConfig(path=str(path), **options), 513)

    check(folder)
    assert "513 tokens are longer than the 512 positions" in caplog.text
    with pytest.raises(ValueError, match=r"reward_model\.model\.path=/nowhere: no Hugging Face"):
        check(Path("/nowhere"))
    with pytest.raises(ValueError, match="is a Qwen3ForCausalLM: a reward model is one"):
        check(make_tiny_model(tmp_path / "policy"))
    two = make_tiny_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match="has 2 labels, which are no score: take one with"):
        check(two)
    with pytest.raises(ValueError, match=r"score\.weight has the shape \[2, 64\]"):
        check(two, override_config={"num_labels": 1})
    file = two / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if k != "score.weight"}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of the model are missing, such as score"):
        check(two, override_config={"num_labels": 1})
    file.unlink()
    with pytest.raises(ValueError, match=r"reward_model\.model\.path=.*holds no weights"):
        check(two, override_config={"num_labels": 1})


def test_values_of_the_configuration_can_be_replaced(folder: Path) -> None:
    """`override_config`: with other rotary frequencies the scores are others."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": 10.0}
    worker = PolicyWorker("cpu")
    model = ClassifierConfig(path=str(folder), override_config={"rope_parameters": rope})
    worker.build_beside("reward_model", model, FSDPConfig())
    found = scores_of(worker, conversations(), LIMITS[0])
    assert np.abs(found - plain_scores(folder)).max() > 1e-3


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_the_model_brings_along_runs_if_it_may(
    trust: bool, folder: Path, tmp_path: Path
) -> None:
    """It doubles the scores."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(OWN_MODEL)
    settings = RewardModelModelConfig(
        path=str(tmp_path), use_remove_padding=trust, trust_remote_code=trust
    )
    check_score_model(settings.classifier(), 9)
    worker = PolicyWorker("cpu")
    worker.build_beside("reward_model", settings.classifier(), FSDPConfig())
    attention = worker.beside["reward_model"].model.lm.config._attn_implementation
    assert attention == ("packed_attention" if trust else "decode")
    found = scores_of(worker, conversations(), LIMITS[1])
    np.testing.assert_allclose(found, (1 + trust) * plain_scores(folder), atol=1e-5)
