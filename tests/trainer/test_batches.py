"""From prompts to the train batch: order, filter, rounds, mini-batches, sampling seeds."""

import copy
import json
import logging
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from threading import Event
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import make_samples, make_tiny_model, make_tiny_reward_model
from verl.config.load import load_config
from verl.config.schema import Config
from verl.models.hf import load_tokenizer
from verl.protocol import Prompt, Sample
from verl.rewards import RewardError, compute_score
from verl.rewards.scorer import RewardManager
from verl.rollout.engine import SamplingParams
from verl.trainer.ppo.batches import (
    METRICS,
    Batches,
    has_spread,
    mini_batches,
    sampling,
    split_groups,
)
from verl.utils.samples import read_samples, write_samples
from verl.utils.timer import Timer
from verl.utils.user_function import UserFunction

WORDS = ["<eos>", "<unk>", "<answer>", "</answer>", "+", "*", "3", "8", "x"]
RIGHT, WRONG = "<answer> 3 * 8 </answer>", "<answer> 3 + 8 </answer>"
M = 20


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")


TOKENIZER = tokenizer()


TRUTH = {"target": 24, "numbers": [3, 8]}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, np.array([6, 7]), "countdown", TRUTH, {}, f"row {i}") for i in range(count)]


def mixed_every(period: int) -> Callable[[int, int], str]:
    """Responses of which one is right where the prompt's index divides by `period`, else none."""
    return lambda index, k: RIGHT if index % period == 0 and k == 0 else WRONG


class Engine:
    """Answers with `text(prompt index, k)`, prompt by prompt, the last prompt first."""

    def __init__(self, text: Callable[[int, int], str]) -> None:
        self.text = text
        self.calls: list[tuple[list[int], list[int], SamplingParams]] = []
        self.ended = Event()

    def __call__(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Iterator[list[Sample]]:
        self.calls.append(([p.index for p in prompts], list(groups), params))
        for prompt, group in reversed(list(zip(prompts, groups, strict=True))):
            samples = []
            for k in range(params.num_responses):
                words = [*self.text(prompt.index, k).split(), "<eos>"]
                ids = np.array([WORDS.index(word) for word in words], np.int64)
                version = params.seed[-1] - 1  # that of the step before
                samples.append(Sample(prompt, group, ids, "stop", k, policy_version=version))
            yield samples
        self.ended.set()


def make_config(**filter_groups) -> Config:
    config = Config()
    config.data.shuffle = False
    config.data.max_response_length = M
    config.data.train_batch_size = config.data.gen_batch_size = 4
    config.actor_rollout_ref.rollout.n = 3
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 2
    for name, value in filter_groups.items():
        setattr(config.algorithm.filter_groups, name, value)
    return config


def make_batches(config: Config, engine: Engine, count: int = 16) -> Batches:
    batches = Batches(config, prompts(count), RewardManager(config, TOKENIZER))
    batches.generate, batches.update_engines = engine, lambda: None
    return batches


def indices(samples: list[Sample]) -> list[int]:
    """The prompt of each group, in order; every group must be whole."""
    groups = split_groups(samples)
    assert all(len(group) == 3 for group in groups)
    assert all(len({s.prompt.index for s in group}) == 1 for group in groups)
    return [group[0].prompt.index for group in groups]


# ------------------------------------------------------------------------------- without filter


def test_groups_come_in_the_order_of_the_prompts_with_scores():
    engine = Engine(mixed_every(2))
    batches = make_batches(make_config(), engine)

    def late(**arguments: Any) -> Any:  # else whether scores come before the end is chance
        assert engine.ended.wait(60)
        return compute_score(**arguments)

    batches.rewards.custom = UserFunction("custom_reward_function", late, 8, 60)
    timer = Timer()
    samples, metrics = batches.next(1, timer)
    assert metrics == {"train/num_gen_batches": 1}
    assert indices(samples) == [0, 1, 2, 3]
    assert [s.group for s in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [s.score for s in samples] == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert [s.reward for s in samples] == [s.score for s in samples]
    assert all(s.extras["acc"] == s.score for s in samples)
    assert set(timer.seconds) == {"gen", "reward"}
    assert indices(batches.next(2, timer)[0]) == [4, 5, 6, 7]
    assert [params for *_, params in engine.calls] == [
        sampling(make_config(), step) for step in (1, 2)
    ]


def test_groups_without_spread_stay_without_a_filter():
    batches = make_batches(make_config(), Engine(lambda index, k: WRONG))
    assert len(batches.next(1, Timer())[0]) == 12


def test_a_validation_goes_in_rounds_of_its_own_size():
    """Prompts are numbered through all rounds: no two responses have the same seed."""
    for size, rounds in ((None, [[0, 1, 2, 3, 4]]), (2, [[0, 1], [2, 3], [4]])):
        config, engine = make_config(), Engine(mixed_every(2))
        config.data.val_batch_size, config.actor_rollout_ref.rollout.val_kwargs.n = size, 3
        batches = make_batches(config, engine)
        batches.val_prompts = prompts(5)
        assert indices(batches.validation(1)) == [0, 1, 2, 3, 4]
        assert [called for called, *_ in engine.calls] == rounds
        assert [numbers for _, numbers, _ in engine.calls] == rounds


def test_the_order_of_prompts_is_that_of_the_seed():
    config, engine = make_config(), Engine(all_mixed)
    config.data.shuffle, config.data.seed = True, 7
    samples = make_batches(config, engine).next(1, Timer()).samples
    assert indices(samples) == np.random.default_rng([7, 0]).permutation(16)[:4].tolist()


def test_gen_batch_size_is_only_for_the_filter():
    for enable, size in ((False, 4), (True, 8)):
        config = make_config(enable=enable, metric="acc")
        config.data.gen_batch_size = 8
        engine = Engine(mixed_every(1))
        make_batches(config, engine).next(1, Timer())
        assert engine.calls[0][0] == list(range(size))


def test_a_batch_larger_than_the_data_names_its_key():
    for enable, key in ((False, "data.train_batch_size"), (True, "data.gen_batch_size")):
        with pytest.raises(ValueError, match=rf"{key}=4 is more than the 3"):
            make_batches(make_config(enable=enable, metric="acc"), Engine(mixed_every(1)), 3)


def test_a_reward_model_is_asked_once_all_responses_are_there(tmp_path):
    """Functions score other prompts of the same round meanwhile."""
    config, engine, calls = make_config(), Engine(mixed_every(1)), []
    config.reward_model.enable = True
    config.actor_rollout_ref.model.path = str(make_tiny_model(tmp_path / "policy"))
    config.reward_model.model.path = str(make_tiny_reward_model(tmp_path / "reward"))
    batches = make_batches(config, engine)
    for prompt in (batches.prompts[1], batches.prompts[2]):
        prompt.messages = [{"role": "user", "content": "+"}]

    def scores(conversations: Sequence[Sample]) -> list[float]:
        assert engine.ended.is_set()
        calls.append([(s.group, s.response_index) for s in conversations])
        return [float(s.group) / 8 for s in conversations]

    batches.rewards.reward_model = scores
    samples, _ = batches.next(1, Timer())
    assert indices(samples) == [0, 1, 2, 3]
    assert [s.score for s in samples] == [1, 0, 0, *3 * [1 / 8], *3 * [2 / 8], 1, 0, 0]
    assert [group for group, _ in calls[0]] == [1, 1, 1, 2, 2, 2] and len(calls) == 1
    assert ["acc" in s.extras for s in samples[::3]] == [True, False, False, True]
    # What was not scored, as somebody stopped looking, is forgotten.
    batches.prompts[4].messages = batches.prompts[5].messages = batches.prompts[1].messages
    groups = batches._round(2, 0, Timer())
    batches.rewards.reward_model = lambda conversations: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(groups)
    batches.rewards.reward_model = scores
    assert len(list(batches._round(3, 0, Timer()))) == 4
    assert [len(asked) for asked in calls] == [6]


def test_a_reward_models_scores_are_filtered(tmp_path):
    config = make_config(enable=True, metric="score", carry_over=False)
    config.reward_model.enable = True
    config.actor_rollout_ref.model.path = str(make_tiny_model(tmp_path / "policy"))
    config.reward_model.model.path = str(make_tiny_reward_model(tmp_path / "reward"))
    batches = make_batches(config, Engine(mixed_every(1)))
    for prompt in batches.prompts:
        prompt.messages = []
    ids = iter(range(1000))
    batches.rewards.reward_model = lambda conversations: [
        next(ids) / 100 if s.prompt.index % 2 else 0.5 for s in conversations
    ]
    samples, metrics = batches.next(1, Timer())
    assert indices(samples) == [1, 3, 5, 7]
    assert metrics["train/num_gen_batches"] == 2 and metrics["train/kept_prompts_ratio"] == 0.5


# ---------------------------------------------------------------------------------- the filter


def test_the_configuration_chooses_rows_and_files(tmp_path, tiny_model):
    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "5"}}
    for name in ("train", "test"):
        rows = [json.dumps(row | {"prompt": f"{i} {i}"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    keys = f"""data.train_files={tmp_path}/train.jsonl data.val_files={tmp_path}/test.jsonl
        data.train_max_samples=4 data.val_max_samples=3 data.train_batch_size=4 data.shuffle=False
        data.apply_chat_template=False actor_rollout_ref.model.path={tiny_model}"""
    config = load_config(keys.split())
    batches = Batches.from_config(config, load_tokenizer(config.actor_rollout_ref.model))
    assert [p.location[-5:] for p in batches.prompts] == [f"row {i}" for i in range(4)]
    assert [p.location[-5:] for p in batches.val_prompts] == [f"row {i}" for i in range(3)]
    assert batches.order.steps_per_epoch == 1
    batches.close()


def test_several_rounds_until_the_batch_is_full():
    engine = Engine(mixed_every(2))
    batches = make_batches(make_config(enable=True, metric="acc", carry_over=False), engine)
    samples, metrics = batches.next(1, Timer())
    assert indices(samples) == [0, 2, 4, 6]
    assert [called for called, *_ in engine.calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert metrics == {
        "train/num_gen_batches": 2,
        "train/num_prompts": 4,
        "train/carried_prompts": 0,
        "train/kept_prompts_ratio": 4 / 7,  # the last prompt is not looked at any more
        "train/all_right_ratio": 0,
        "train/all_wrong_ratio": 3 / 7,
    }
    # No two prompts of a step share a group, so no two responses share a seed.
    groups = [group for _, numbers, _ in engine.calls for group in numbers]
    assert len(set(groups)) == len(groups) == 8
    # The next step goes on in the data.
    assert indices(batches.next(2, Timer())[0]) == [8, 10, 12, 14]


def test_groups_that_are_all_right_or_all_wrong_are_dropped():
    def text(index: int, k: int) -> str:
        return [RIGHT, WRONG, RIGHT if k == 2 else WRONG, WRONG if k == 2 else RIGHT][index % 4]

    batches = make_batches(make_config(enable=True, metric="acc"), Engine(text))
    assert indices(batches.next(1, Timer())[0]) == [2, 3, 6, 7]


# ------------------------------------------------------------------------- more than is needed


def all_mixed(index: int, k: int) -> str:
    return RIGHT if k == 0 else WRONG


def surplus(engine: Engine, gen_batch_size: int, **rule) -> Batches:
    """Batches of 4 prompts from rounds of more than that."""
    config = make_config(enable=True, metric="acc", **rule)
    config.data.gen_batch_size = gen_batch_size
    return make_batches(config, engine, 60)


def test_without_carry_over_the_rest_is_dropped():
    batches = surplus(Engine(all_mixed), 6, carry_over=False)
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]
    samples, metrics = batches.next(2, Timer())
    assert indices(samples) == [6, 7, 8, 9]
    assert (metrics["train/num_gen_batches"], metrics["train/carried_prompts"]) == (1, 0)


def test_surplus_groups_start_the_next_step():
    batches = surplus(Engine(all_mixed), 6)
    samples, metrics = batches.next(1, Timer())
    assert indices(samples) == [0, 1, 2, 3]
    assert {s.policy_version for s in samples} == {0}
    assert metrics["train/carried_prompts"] == 0
    samples, metrics = batches.next(2, Timer())
    assert indices(samples) == [4, 5, 6, 7]
    assert [s.policy_version for s in samples] == [0] * 6 + [1] * 6
    # Groups are numbered anew: those of two steps must not become one.
    assert [s.group for s in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (metrics["train/num_gen_batches"], metrics["train/carried_prompts"]) == (1, 2)


def test_nothing_is_carried_twice():
    # Of 20 prompts, step 1 uses 4 and step 2 can use 4; the other 12 would be too old.
    engine = Engine(all_mixed)
    batches = surplus(engine, 20)
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]
    samples, metrics = batches.next(2, Timer())
    assert indices(samples) == [4, 5, 6, 7]
    assert len(engine.calls) == 1
    assert (metrics["train/num_gen_batches"], metrics["train/carried_prompts"]) == (0, 4)
    assert "train/kept_prompts_ratio" not in metrics
    samples, metrics = batches.next(3, Timer())
    assert indices(samples) == [20, 21, 22, 23]
    assert {s.policy_version for s in samples} == {2}
    assert metrics["train/carried_prompts"] == 0


def test_a_step_cut_to_mini_batches_carries_what_is_left_while_it_is_young():
    # Rounds of 4 keep 3 prompts; one round a step; mini-batches of 2.
    config = make_config(enable=True, metric="acc", max_num_gen_batches=1)
    engine = Engine(lambda index, k: RIGHT if index % 4 and k == 0 else WRONG)
    batches = make_batches(config, engine, 60)
    assert indices(batches.next(1, Timer())[0]) == [1, 2]
    assert indices(batches.next(2, Timer())[0]) == [3, 5, 6, 7]
    assert indices(batches.next(3, Timer())[0]) == [9, 10]
    config.algorithm.filter_groups.max_num_gen_batches = 0
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 4
    assert indices(batches.next(4, Timer())[0]) == [11, 13, 14, 15]


def test_nothing_is_carried_past_the_next_step():
    # Step 2 gets 4, 5 and 6 and finds nothing else: one mini-batch of 2. In step 3 the prompt that
    # is left would be of a policy two versions back.
    batches = surplus(
        Engine(lambda index, k: RIGHT if index < 7 and k == 0 else WRONG), 7, max_num_gen_batches=1
    )
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]
    assert [group[0].prompt.index for group in batches.carried] == [4, 5, 6]
    samples, metrics = batches.next(2, Timer())
    assert indices(samples) == [4, 5]
    assert (metrics["train/num_gen_batches"], metrics["train/carried_prompts"]) == (1, 2)
    assert batches.carried == []


def test_progress_is_prompts_kept_of_those_needed(caplog):
    with caplog.at_level(logging.INFO):
        surplus(InOrder(all_mixed), 7).next(1, Timer())
    assert caplog.messages == ["prompts kept: 4 of 4, surplus: 3"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_batches(make_config(enable=True, metric="acc"), Engine(all_mixed)).next(1, Timer())
    assert caplog.messages == ["prompts kept: 4 of 4, surplus: 0"]


def test_carried_groups_survive_a_checkpoint(tmp_path):
    first, second = (surplus(Engine(all_mixed), 6) for _ in range(2))
    first.next(1, Timer())
    carried = [sample for group in first.carried for sample in group]
    carried[0].rollout_log_probs = np.array([-0.1] * carried[0].length, np.float32)
    carried[0].extras["note"] = np.float32(0.5)
    write_samples(tmp_path / "carried.feather", carried)
    second.order.load_state_dict(first.order.state_dict())
    second.carried = split_groups(read_samples(tmp_path / "carried.feather", second.prompts))
    ours, theirs = (batches.next(2, Timer())[0] for batches in (first, second))
    assert indices(theirs) == indices(ours) == [4, 5, 6, 7]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.response_ids == b.response_ids).all()
        for name in ("group", "response_index", "score", "reward", "extras", "policy_version"):
            assert getattr(a, name) == getattr(b, name)
    assert theirs[0].rollout_log_probs.dtype == np.float32
    assert (theirs[0].rollout_log_probs == carried[0].rollout_log_probs).all()
    assert theirs[1].rollout_log_probs is None


def test_a_checkpoint_of_other_data_is_an_error(tmp_path):
    batches = surplus(Engine(all_mixed), 6)
    samples, _ = batches.next(1, Timer())
    write_samples(tmp_path / "carried.feather", samples)
    with pytest.raises(ValueError, match=r"carried\.feather: prompt 3 is not in data\.train_files"):
        read_samples(tmp_path / "carried.feather", prompts(3))
    with pytest.raises(ValueError, match=r"none\.feather is missing"):
        read_samples(tmp_path / "none.feather", [])


class InOrder(Engine):
    """Finishes one prompt after the other, the first one first, until it is closed."""

    def __init__(self, text: Callable[[int, int], str], seconds: float = 0.05) -> None:
        super().__init__(text)
        self.finished, self.seconds = 0, seconds

    def __call__(self, prompts, groups, params):
        for samples in reversed(list(super().__call__(prompts, groups, params))):
            self.finished += 1
            yield samples
            time.sleep(self.seconds)  # so that scores are known before the next prompt is finished


def test_generation_stops_when_this_step_and_the_next_have_enough():
    for carry_over, most in ((True, 8), (False, 4)):
        engine = InOrder(all_mixed)
        surplus(engine, 40, carry_over=carry_over).next(1, Timer())
        assert most <= engine.finished < 20


def test_what_is_kept_does_not_depend_on_who_finishes_first():
    batches = [surplus(engine(mixed_every(2)), 30) for engine in (Engine, InOrder)]
    for step in (1, 2, 3):
        one, other = (indices(b.next(step, Timer())[0]) for b in batches)
        assert one == other
        assert [g[0].prompt.index for g in batches[0].carried] == [
            g[0].prompt.index for g in batches[1].carried
        ]


# ----------------------------------------------------------------------- errors of the rewards


def failing(batches: Batches, index: int) -> Batches:
    """The same batches, but the responses to this prompt can't be scored."""
    batches.prompts[index].ground_truth = None
    return batches


@pytest.mark.parametrize("engine", [Engine, InOrder])
def test_an_error_of_a_prompt_that_is_not_needed_does_not_matter(engine):
    batches = failing(surplus(engine(all_mixed), 10, carry_over=False), 9)
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("engine", [Engine, InOrder])
@pytest.mark.parametrize("enable", [True, False])
def test_an_error_of_a_prompt_that_is_needed_is_raised(engine, enable):
    config = make_config(enable=enable, metric="acc")
    with pytest.raises(RewardError, match="row 3"):
        failing(make_batches(config, engine(all_mixed)), 3).next(1, Timer())


@pytest.mark.parametrize("engine", [Engine, InOrder])
def test_every_error_of_a_validation_is_raised(engine):
    config = make_config()
    batches = failing(make_batches(config, engine(all_mixed)), 15)
    batches.val_prompts = batches.prompts
    with pytest.raises(RewardError, match="row 15"):
        batches.validation(1)


class Together(Engine):
    """Hands over the responses to all prompts at once."""

    def __call__(self, prompts, groups, params):
        yield [s for samples in super().__call__(prompts, groups, params) for s in samples]


def test_an_error_stays_with_its_own_prompt():
    batches = failing(surplus(Together(all_mixed), 10, carry_over=False), 9)
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]


def test_what_is_still_being_scored_is_cancelled_after_an_early_stop(tmp_path):
    calls, code = tmp_path / "calls", tmp_path / "reward.py"
    code.write_text(
        textwrap.dedent(f"""
        import time

        def compute_score(data_source, solution_str, ground_truth, extra_info):
            with open({str(calls)!r}, "a") as file:
                file.write("x")
            time.sleep(0.02)
            return float("*" in solution_str)
        """)
    )
    config = make_config(enable=True, metric="acc", carry_over=False)
    config.data.gen_batch_size = 20
    config.custom_reward_function.path = str(code)
    config.reward_model.num_workers = 1
    engine = InOrder(all_mixed, seconds=0)
    batches = make_batches(config, engine, 20)
    assert indices(batches.next(1, Timer())[0]) == [0, 1, 2, 3]
    assert engine.finished == 20
    time.sleep(0.1)
    called = calls.stat().st_size
    time.sleep(0.1)
    assert calls.stat().st_size == called < 60


def kept_by(metric: str, config: Config, text: Callable[[int, int], str]) -> list[int]:
    """Which of the prompts 0 to 3 the filter keeps in its only round."""
    rule = config.algorithm.filter_groups
    rule.enable, rule.metric, rule.max_num_gen_batches = True, metric, 1
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
    return indices(make_batches(config, Engine(text)).next(1, Timer())[0])


@pytest.mark.parametrize(
    ("metric", "kept"),
    [("acc", [0]), ("score", [0]), ("seq_reward", [0, 1]), ("seq_final_reward", [0, 1])],
)
def test_rewards_have_the_overlong_punishment_and_scores_do_not(metric, kept):
    config = make_config()
    config.reward_model.reward_manager = "dapo"
    buffer = config.reward_model.overlong_buffer
    buffer.enable, buffer.len, buffer.penalty_factor = True, 8, 1.0

    def text(index: int, k: int) -> str:
        if index == 0:
            return RIGHT if k == 0 else WRONG
        # Prompt 1: one of its wrong responses reaches into the last 8 of the 20 tokens.
        return "x " * (13 if index == 1 and k == 0 else 3) + WRONG

    assert kept_by(metric, config, text) == kept


def test_shares_count_groups_that_are_kept_for_their_punishment():
    config = make_config(enable=True, metric="seq_final_reward", max_num_gen_batches=1)
    config.reward_model.reward_manager = "dapo"
    buffer = config.reward_model.overlong_buffer
    buffer.enable, buffer.len, buffer.penalty_factor = True, 8, 1.0

    def text(index: int, k: int) -> str:
        # Of prompt 0 all responses are right, of 1 all wrong, of 2 some are; 3 has no spread.
        words = WRONG if index % 2 or (index == 2 and k) else RIGHT
        return "x " * (13 if index < 2 and k == 0 else 3) + words

    samples, metrics = make_batches(config, Engine(text)).next(1, Timer())
    assert indices(samples) == [0, 1]
    assert metrics["train/kept_prompts_ratio"] == 3 / 4
    assert metrics["train/all_right_ratio"] == 1 / 4
    assert metrics["train/all_wrong_ratio"] == 2 / 4
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 4
    with pytest.raises(ValueError, match="25% of the prompts all right, 50% all wrong"):
        make_batches(config, Engine(text)).next(1, Timer())


@pytest.mark.parametrize(
    ("metric", "kept"), [("acc", [0, 1]), ("score", [0, 2]), ("seq_final_reward", [0, 2])]
)
def test_accuracy_and_score_are_two_metrics(tmp_path, metric, kept):
    path = tmp_path / "reward.py"
    path.write_text(
        textwrap.dedent("""
        def compute_score(data_source, solution_str, ground_truth, extra_info):
            return {"acc": solution_str.count("3"), "score": solution_str.count("8")}
        """)
    )
    config = make_config()
    config.custom_reward_function.path = str(path)

    def text(index: int, k: int) -> str:
        return ["x", ["3 8", "3", "8", "x"][index]][k == 0]

    assert kept_by(metric, config, text) == kept


def test_every_metric_is_one_that_the_configuration_offers():
    rule = type(make_config().algorithm.filter_groups).__dataclass_fields__["metric"]
    assert set(METRICS) == set(rule.metadata["rules"].choices)


def test_spread_within_a_group_of_one_and_of_equal_numbers():
    samples = make_samples([1, 1, 1], score=0.5)
    assert not has_spread(samples, "score")
    assert not has_spread(samples[:1], "score")
    samples[2].score = 0.25
    assert has_spread(samples, "score")


def test_the_limit_of_rounds_leaves_whole_mini_batches(caplog):
    # 3 of 12 prompts are kept in 3 rounds: one mini-batch of 2.
    engine = Engine(mixed_every(4))
    config = make_config(enable=True, metric="acc", max_num_gen_batches=3)
    batches = make_batches(config, engine)
    with caplog.at_level(logging.WARNING):
        samples, metrics = batches.next(1, Timer())
    assert indices(samples) == [0, 4]
    assert len(engine.calls) == metrics["train/num_gen_batches"] == 3
    assert metrics["train/kept_prompts_ratio"] == 0.25
    assert metrics["train/num_prompts"] == 2
    (record,) = caplog.records
    assert (
        "training on 2 of 4 prompts: algorithm.filter_groups.max_num_gen_batches=3"
        in record.getMessage()
    )


@pytest.mark.parametrize("limit", [0, -1])
def test_no_limit_of_rounds(limit, caplog):
    engine = Engine(mixed_every(4))
    config = make_config(enable=True, metric="acc", max_num_gen_batches=limit)
    with caplog.at_level(logging.WARNING):
        samples, _ = make_batches(config, engine).next(1, Timer())
    assert indices(samples) == [0, 4, 8, 12]
    assert len(engine.calls) == 4
    assert not caplog.records


def test_data_without_spread_is_named_while_it_is_looked_for(caplog):
    class Patience(Exception):
        pass

    def text(index: int, k: int) -> str:
        if len(engine.calls) == 9:
            raise Patience
        return RIGHT if index < 4 or (len(engine.calls) == 1 and index == 5 and k) else WRONG

    # Rounds of 6 of the 12 prompts: one is kept in the first, and none in the seven after it.
    engine = Engine(text)
    config = make_config(enable=True, metric="acc")
    config.data.gen_batch_size = 6
    with caplog.at_level(logging.WARNING), pytest.raises(Patience):
        make_batches(config, engine, 12).next(1, Timer())
    assert caplog.messages == [
        "algorithm.filter_groups kept none of 12 prompts, as many as there are: "
        f"{right} of the prompts all right, {wrong} all wrong"
        for right, wrong in (("44%", "50%"), ("40%", "57%"), ("38%", "60%"))
    ]


@pytest.mark.parametrize(("period", "kept"), [(99, 1), (8, 1)])
def test_less_than_a_mini_batch_is_an_error_with_its_remedies(period, kept):
    engine = Engine(mixed_every(period))
    config = make_config(enable=True, metric="acc", max_num_gen_batches=2)
    with pytest.raises(ValueError, match=f"kept {kept} of 8 prompts in 2 rounds") as error:
        make_batches(config, engine).next(1, Timer())
    shares = f"0% of the prompts all right, {(8 - kept) / 8:.0%} all wrong"
    for remedy in ("rollout.n", "max_num_gen_batches", "easier or harder prompts", shares):
        assert remedy in str(error.value)


def test_nothing_kept_at_all_is_the_same_error():
    config = make_config(enable=True, metric="seq_reward", max_num_gen_batches=1)
    with pytest.raises(ValueError, match="kept 0 of 4 prompts in 1 rounds"):
        make_batches(config, Engine(lambda index, k: RIGHT)).next(1, Timer())


def test_the_order_resumes_where_it_was():
    config = make_config(enable=True, metric="acc")
    config.data.shuffle = True
    first, second = (make_batches(config, Engine(mixed_every(2))) for _ in range(2))
    first.next(1, Timer())
    second.order.load_state_dict(first.order.state_dict())
    second.carried = first.carried
    assert indices(second.next(2, Timer())[0]) == indices(first.next(2, Timer())[0])


# ------------------------------------------------- one greedy response, and several rewards in one


def greedy_is_right(period: int) -> Callable[[int, int], str]:
    """The first response is right, and the greedy one, number 3, where the index divides."""
    return lambda index, k: RIGHT if k == 0 or (k == 3 and index % period == 0) else WRONG


def baselines(samples: list[Sample]) -> list[float]:
    """The greedy response's reward of each group, which all responses of it know."""
    groups = split_groups(samples)
    assert all([s.response_index for s in group] == [0, 1, 2] for group in groups)
    assert all(len({s.baseline for s in group}) == 1 for group in groups)
    return [group[0].baseline for group in groups]


def test_remax_scores_a_greedy_response_and_does_not_train_on_it():
    config = make_config()
    config.algorithm.adv_estimator = "remax"
    engine = Engine(greedy_is_right(2))
    batches = make_batches(config, engine)
    samples = batches.next(1, Timer()).samples
    right, wrong = (compute_score("countdown", t, TRUTH)["score"] for t in (RIGHT, WRONG))
    assert right != wrong and baselines(samples) == [right, wrong, right, wrong]
    assert len(samples) == 12 and engine.calls[0][2].greedy
    batches.val_prompts = prompts(2)
    assert len(batches.validation(1)) == 2 and not engine.calls[1][2].greedy


def test_remax_with_filter_carry_over_and_checkpoint(tmp_path):
    """A group's baseline stays with it; the filter looks at the sampled responses alone."""

    def text(index: int, k: int) -> str:
        differs = index % 2 and k == 0
        return RIGHT if differs or (k == 3 and index % 4 < 2) else WRONG

    config = make_config(enable=True, metric="acc")
    config.algorithm.adv_estimator = "remax"
    config.data.gen_batch_size = 12
    first, second = (make_batches(config, Engine(text), 24) for _ in range(2))
    samples = first.next(1, Timer()).samples
    assert indices(samples) == [1, 3, 5, 7]
    high, low = baselines(samples)[:2]
    assert high > low and baselines(samples) == [high, low, high, low]
    write_samples(tmp_path / "carried.feather", [s for group in first.carried for s in group])
    second.order.load_state_dict(first.order.state_dict())
    second.carried = split_groups(read_samples(tmp_path / "carried.feather", second.prompts))
    for batches in (first, second):
        samples = batches.next(2, Timer()).samples
        assert indices(samples) == [9, 11, 13, 15]
        assert baselines(samples) == [high, low, high, low]


def test_remax_takes_one_response_each_ahead_of_the_step():
    config = make_config()
    config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n = "remax", 1
    config.trainer.async_rollout, config.trainer.total_training_steps = True, 2
    batches = make_batches(config, Engine(lambda index, k: RIGHT if k == index % 2 else WRONG))
    for step in (1, 2):
        samples = batches.next(step, Timer()).samples
        assert [s.reward > s.baseline for s in samples] == [True, False, True, False]
    batches.close()


@pytest.mark.parametrize("key", ["format", "pred"])
def test_a_reward_that_gdpo_misses_is_named_and_nothing_is_lost(key):
    config = make_config()
    config.algorithm.adv_estimator, config.algorithm.gdpo_reward_keys = "gdpo", ["score", "acc"]
    batches = make_batches(config, Engine(greedy_is_right(2)))
    assert len(batches.next(1, Timer()).samples) == 12
    config.algorithm.gdpo_reward_keys = ["score", key]
    with pytest.raises(ValueError, match=f"row 4: {key} of algorithm.gdpo_reward_keys is .*'acc'"):
        batches.next(2, Timer())
    assert batches.state().order["batches_taken"] == 1


# ------------------------------------------------------------------------------------- prefetch


def prefetching(engine: Engine) -> Batches:
    """Batches one step ahead, which note when the engines get weights."""
    config = make_config()
    config.trainer.async_rollout = True
    config.trainer.total_training_steps = 9
    batches = make_batches(config, engine, 60)
    batches.updates = []
    batches.update_engines = lambda: batches.updates.append(len(engine.calls))
    return batches


def test_prefetched_batches_are_those_without_prefetch_with_weights_in_between():
    engine = Engine(mixed_every(2))
    batches, plain = prefetching(engine), make_batches(make_config(), Engine(mixed_every(2)), 60)
    for step in (1, 2, 3):
        assert indices(batches.next(step, Timer()).samples) == indices(
            plain.next(step, Timer()).samples
        )
        batches.policy_updated(1)  # the engines are busy with the next batch
    batches.state()  # waits
    assert batches.updates == [2, 3]  # after the second and the third batch, before the next
    assert len(engine.calls) == 4
    batches.close()


def test_a_prefetched_batch_is_saved_and_comes_first_whether_the_resumed_run_prefetches_or_not():
    first = prefetching(Engine(mixed_every(2)))
    first.next(1, Timer())
    state = first.state()
    expected = indices(first.next(2, Timer()).samples)
    for resumed in (
        prefetching(Engine(mixed_every(2))),
        make_batches(make_config(), Engine(mixed_every(2)), 60),
    ):
        resumed.load(copy.deepcopy(state))
        assert indices(resumed.next(2, Timer()).samples) == expected
        following = indices(resumed.next(3, Timer()).samples)
        assert following == [8, 9, 10, 11]
        resumed.close()
    assert resumed.state().prefetched is None
    first.close()


def test_a_prefetch_that_fails_is_saved_as_not_begun_however_often():
    def text(index: int, k: int) -> str:
        if index == 4:
            raise RewardError("no answer")
        return RIGHT

    batches = prefetching(Engine(text))
    batches.next(1, Timer())
    for _ in range(2):
        state = batches.state()
        assert state.prefetched is None and state.order["batches_taken"] == 1
    with pytest.raises(RewardError, match="no answer"):
        batches.next(2, Timer())
    assert batches.state().order["batches_taken"] == 1
    batches.close()


def test_a_prefetched_batch_outlives_engines_that_take_no_weights():
    def fail() -> None:
        raise RuntimeError("no engine left")

    batches = prefetching(Engine(mixed_every(2)))
    batches.next(1, Timer())
    expected, batches.update_engines = batches.state().prefetched, fail
    with pytest.raises(RuntimeError, match="no engine left"):
        batches.next(2, Timer())
    assert expected is not None and batches.state().prefetched is expected
    batches.close()


# ---------------------------------------------------------------------------------- mini-batches


def whole_groups(config: Config, samples: list[Sample], step: int) -> list[list[int]]:
    """The groups of each mini-batch; every group must be whole and in one piece."""
    result = []
    for batch in mini_batches(config.actor_rollout_ref.actor, samples, (config.data.seed, step)):
        groups = split_groups(batch)
        assert all(len(group) == 2 for group in groups)
        result.append([group[0].group for group in groups])
    return result


def mini_batch_config(**settings) -> Config:
    config = Config()
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 2
    for name, value in settings.items():
        setattr(config.actor_rollout_ref.actor, name, value)
    return config


def test_mini_batches_in_order():
    samples = make_samples([1] * 12)  # two responses to each of six prompts
    assert whole_groups(mini_batch_config(), samples, 1) == [[0, 1], [2, 3], [4, 5]]
    twice = whole_groups(mini_batch_config(ppo_epochs=2), samples, 1)
    assert twice == [[0, 1], [2, 3], [4, 5]] * 2
    batches = list(mini_batches(mini_batch_config().actor_rollout_ref.actor, samples, (1, 1)))
    assert all(a is b for a, b in zip(chain(*batches), samples, strict=True))


def test_shuffled_mini_batches():
    samples = make_samples([1] * 40)
    config = mini_batch_config(shuffle=True, ppo_epochs=3)
    batches = whole_groups(config, samples, 5)
    assert batches == whole_groups(config, samples, 5)
    epochs = [list(chain(*batches[i : i + 10])) for i in (0, 10, 20)]
    assert len(batches) == 30
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches != whole_groups(config, samples, 6)
    config.data.seed = 2
    assert batches != whole_groups(config, samples, 5)


# ------------------------------------------------------------------------------------- sampling


def test_training_and_validation_draw_differently_in_each_step():
    config = make_config()
    seeds = {
        sampling(config, step, validation).seed for validation in (False, True) for step in (1, 2)
    }
    assert len(seeds) == 4
    config.actor_rollout_ref.rollout.seed = 1
    assert sampling(config, 1).seed not in seeds
    assert sampling(config, 1) == sampling(config, 1)


def test_sampling_follows_the_configuration():
    config = make_config()
    rollout = config.actor_rollout_ref.rollout
    rollout.temperature, rollout.top_p, rollout.top_k, rollout.ignore_eos = 0.9, 0.8, 7, True
    assert sampling(config, 3) == SamplingParams(
        n=3, max_tokens=M, temperature=0.9, top_p=0.8, top_k=7, ignore_eos=True, seed=(0, 0, 3)
    )
    rollout.do_sample = False  # as an evaluation alone may have it
    assert sampling(config, 3).temperature == 0
    val = rollout.val_kwargs
    val.n, val.temperature, val.top_p, val.top_k = 4, 0.6, 0.7, 5
    for do_sample, temperature in ((False, 0.0), (True, 0.6)):
        val.do_sample = do_sample
        assert sampling(config, 3, True) == SamplingParams(
            n=4, max_tokens=M, temperature=temperature, top_p=0.7, top_k=5, seed=(0, 1, 3)
        )
