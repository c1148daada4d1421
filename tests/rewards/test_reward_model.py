"""What a reward model reads, and what becomes of its scores."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import VOCABULARY, make_tiny_model, make_tiny_reward_model, make_tokenizer
from verl.config.schema import Config
from verl.protocol import Prompt, Sample
from verl.rewards import RewardError
from verl.rewards.scorer import RewardManager

POLICY = make_tokenizer()
WORDS = [*VOCABULARY[:3], *reversed(VOCABULARY[3:])]  # of the reward model, by id


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reward model."""
    policy = make_tiny_model(tmp_path_factory.mktemp("policy"))
    return policy, make_tiny_reward_model(tmp_path_factory.mktemp("reward"))


def make_config(models: tuple[Path, Path]) -> Config:
    config = Config()
    config.actor_rollout_ref.model.path, config.reward_model.model.path = map(str, models)
    config.actor_rollout_ref.model.tokenizer_path = None
    config.reward_model.enable = True
    config.data.max_prompt_length, config.data.max_response_length = 10, 10
    return config


def sample(index: int, question: str, answer: str, end: bool = True) -> Sample:
    """The policy's tokens of the question are others than the messages: its template's."""
    messages = [{"role": "user", "content": question}]
    prompt = Prompt(index, np.array([90, 91]), "chat", None, {}, f"row {index}", messages)
    ids = np.array(POLICY(answer)["input_ids"] + [0] * end, np.int64)
    return Sample(prompt, index, ids, "stop" if end else "length")


def read(manager: RewardManager, *samples: Sample) -> list[list[str]]:
    """The reward model's tokens of each conversation."""
    assert manager.conversations is not None
    found = manager.conversations.read(samples, manager.texts(samples))
    assert all(len(s.response_ids) == 1 for s in found)
    return [[WORDS[i] for i in s.prompt.token_ids] for s in found]


def test_the_conversation_is_rendered_by_the_models_own_template(models: tuple[Path, Path]) -> None:
    manager = RewardManager(make_config(models), POLICY)
    found = read(manager, sample(0, "1 + 2", "3"), sample(1, "4", "5 6", end=False))
    assert found == [["1", "+", "2", "=", "3", "*"], ["4", "=", "5", "6", "*"]]


def test_special_tokens_within_a_response_can_be_left_out(models: tuple[Path, Path]) -> None:
    config = make_config(models)
    assert read(RewardManager(config, POLICY), sample(0, "1", "<pad> 3")) == [
        ["1", "=", "<pad>", "3", "*"]
    ]
    config.reward_model.skip_special_tokens = True
    assert read(RewardManager(config, POLICY), sample(0, "1", "<pad> 3")) == [["1", "=", "3", "*"]]


def test_long_conversations_are_cut_on_the_right(
    models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(models)
    long = sample(0, "1 2 3 4 5 6 7 8 9 10", "11 12 13 14 15 16 17 18 19 20", end=False)
    assert [len(row) for row in read(RewardManager(config, POLICY), long)] == [20]  # of 22
    assert "1 of 1 conversations were cut on the right to reward_model.max_length=20" in caplog.text
    config.reward_model.max_length = 4
    found = read(RewardManager(config, POLICY), long, sample(1, "1", "2"))
    assert found == [["1", "2", "3", "4"], ["1", "=", "2", "*"]]


def test_the_policys_tokens_are_read_as_they_are(models: tuple[Path, Path]) -> None:
    config = make_config(models)
    config.reward_model.model.input_tokenizer = None
    manager = RewardManager(config, POLICY)
    assert manager.conversations is not None
    (found,) = manager.conversations.read([sample(0, "1", "3")], [""])
    assert found.prompt.token_ids.tolist() == [90, 91, *POLICY("3")["input_ids"], 0]


def test_models_that_cannot_read_are_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(models)
    config.reward_model.model.path = str(make_tiny_reward_model(tmp_path, vocab_size=50))
    manager = RewardManager(config, POLICY)
    with pytest.raises(RewardError, match=r"row 7: the tokenizer gives token \d+, but the model"):
        read(manager, sample(7, "1", "2"))
    config.reward_model.model.input_tokenizer = None
    with pytest.raises(ValueError, match=r"the policy has 110 tokens, and the reward model .* 50:"):
        RewardManager(config, POLICY)
    config.reward_model.model.input_tokenizer = "policy"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the tokenizer has no chat template: add one, or set"):
        RewardManager(config, POLICY)
    strict = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(strict)
    manager = RewardManager(config, POLICY)
    prompt = sample(3, "1", "2").prompt
    manager.connect([prompt], tmp_path)
    assert prompt.messages is not None
    prompt.messages.append({"role": "assistant", "content": "x"})
    with pytest.raises(ValueError, match=r"row 3: the chat template of .* rejects it: too many"):
        manager.connect([prompt], tmp_path)


def test_rows_that_nothing_scores_are_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    """In a validation, where functions score rows that don't ask for the model."""
    prompt = sample(4, "1", "2").prompt
    manager = RewardManager(make_config(models), POLICY)
    manager.connect([prompt], tmp_path)
    prompt.messages = None
    with pytest.raises(ValueError, match=r"row 4, key 'data_source': .*; the reward model scores"):
        manager.connect([prompt], tmp_path)


def test_scores_come_when_the_model_is_asked(models: tuple[Path, Path]) -> None:
    """All samples in one call, in the order of their groups; penalties as with functions."""
    config = make_config(models)
    config.reward_model.reward_manager = "dapo"
    buffer = config.reward_model.overlong_buffer
    buffer.enable, buffer.len, buffer.penalty_factor, buffer.log = True, 4, 2.0, True
    manager, calls = RewardManager(config, POLICY), []

    def by_first_token(conversations: Sequence[Sample]) -> list[float]:
        calls.append([s.group for s in conversations])
        return [float(WORDS[s.prompt.token_ids[0]]) for s in conversations]

    manager.reward_model = by_first_token
    late, early = sample(2, "7", "1 2 3 4 5 6 7 8"), sample(1, "5", "3")
    futures: list[Future[list[Sample]]] = [manager.submit([late]), manager.submit([early])]
    assert not any(future.done() for future in futures)
    manager.ask_model()
    assert [future.result() for future in futures] == [[late], [early]]
    assert calls == [[1, 2]]
    assert (early.score, early.reward, early.extras) == (5, 5, {"overlong_reward": 0})
    assert (late.score, late.reward) == (7, 7 - 2 * 3 / 4)  # 9 tokens; from 6 on they cost
    manager.ask_model()
    assert len(calls) == 1
    manager.reward_model = lambda conversations: [float("nan")]
    manager.submit([early])
    with pytest.raises(RewardError, match="row 1: nan"):
        manager.ask_model()
