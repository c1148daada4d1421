"""How a custom reward function is called: by name, with copies, from a file that children find."""

import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.helpers import warm_python
from tests.rewards.test_scorer import custom, manager, sample
from verl.config.load import load_config
from verl.config.schema import RewardModelConfig
from verl.trainer.ppo.checks import warn_of_equal_scores
from verl.utils.samples import plain


@pytest.mark.parametrize(
    "parameters",
    [
        "solution_str, ground_truth, data_source=None, extra_info=None",
        "ground_truth, solution_str",
        "*, solution_str, **others",
        "data_source, solution_str, ground_truth, extra_info",
        "**arguments",
    ],
)
def test_arguments_are_given_by_name(tmp_path: Path, parameters: str) -> None:
    text = "arguments['solution_str']" if parameters == "**arguments" else "solution_str"
    code = f"def compute_score({parameters}): return float({text} == '3 + 8')\n"
    one = sample("3 + 8 <eos>", truth="truth")
    manager(function=custom(tmp_path, code)).submit([one]).result()
    assert one.score == 1.0


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ("response, truth", "missing a required argument: 'response'"),
        ("solution_str, /", "'solution_str' parameter is positional only"),
        ("*arguments, judge", "missing a required argument: 'judge'"),
    ],
)
def test_a_function_with_other_arguments_is_refused(
    tmp_path: Path, parameters: str, problem: str
) -> None:
    function = custom(tmp_path, f"def judge({parameters}): return 1.0\n", name="judge")
    names = "data_source, solution_str, ground_truth, extra_info"
    with pytest.raises(ValueError) as refused:
        manager(function=function)
    message = str(refused.value)
    assert message.startswith("custom_reward_function.name=judge: ") and problem in message
    assert message.endswith(f"it is called by name, with {names}")


def test_more_arguments_come_from_the_configuration(tmp_path: Path) -> None:
    keys = [
        "custom_reward_function.reward_kwargs.scale=2",
        "+custom_reward_function.reward_kwargs.w=[3]",
    ]
    path = custom(tmp_path, "def compute_score(scale, w, **others): return scale * w.pop()\n").path
    config = load_config([f"custom_reward_function.path={path}", *keys]).custom_reward_function
    samples = [sample("x"), sample("x")]
    manager(function=config).submit(samples).result()
    assert [s.score for s in samples] == [6, 6]  # pop changed a copy
    config = load_config([f"custom_reward_function.path={path}", keys[0]]).custom_reward_function
    with pytest.raises(ValueError, match=r"missing a required argument: 'w'; .*extra_info, scale"):
        manager(function=config)


def test_arguments_that_are_given_twice_are_refused(tmp_path: Path) -> None:
    function = custom(tmp_path, "def compute_score(**others): return 1.0\n")
    function.reward_kwargs = {"extra_info": 1}
    with pytest.raises(ValueError, match="extra_info is given with each call: drop it"):
        manager(function=function)


def test_a_package_beside_the_file_is_no_reward_function(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "__init__.py").write_text("def compute_score(): return 0.0\n")
    function = custom(tmp_path, "def compute_score(): return 1.0\n")
    with pytest.raises(ValueError, match="the folder reward beside it hides it"):
        manager(function=function)


@pytest.mark.parametrize("kind", ["", "async "])
def test_what_a_function_does_to_its_arguments_reaches_no_other_call(
    tmp_path: Path, kind: str
) -> None:
    code = f"""
    {kind}def compute_score(ground_truth, extra_info):
        ground_truth["numbers"].append(9)
        extra_info["seen"] = ground_truth
        return {{"score": len(ground_truth["numbers"]), "info": extra_info}}
    """
    truth = {"target": 24, "numbers": [3, 8]}
    samples = [sample("x", truth=truth) for _ in range(3)]
    for other in samples[1:]:
        other.prompt = samples[0].prompt
    manager(RewardModelConfig(num_workers=3), custom(tmp_path, code)).submit(samples).result()
    assert [s.score for s in samples] == [3, 3, 3]
    assert truth == {"target": 24, "numbers": [3, 8]}
    assert samples[0].prompt.extra_info == {"index": 0}
    assert samples[0].extras["info"] is not samples[1].extras["info"]


def test_processes_that_a_function_starts_find_it(tmp_path: Path) -> None:
    code = """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    def words(text):
        return len(text.split())

    def compute_score(solution_str, **others):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(words, solution_str).result()
    """
    custom(tmp_path, code)
    program = f"""
    from tests.rewards.test_scorer import manager, sample
    from verl.config.schema import CustomRewardConfig

    rewards = manager(function=CustomRewardConfig(path="{tmp_path}/reward.py"))
    (one,) = rewards.submit([sample("3 + 8 <eos>")]).result()
    assert one.score == 3
    rewards.close()
    """
    command = [warm_python(), "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_files_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    scores = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        function = custom(tmp_path / name, f"def compute_score(): return {len(scores)}\n")
        rewards = manager(function=function)
        scores += [s.score for s in rewards.submit([sample("x")]).result()]
    assert scores == [0, 1]


@pytest.mark.parametrize(("skip", "text"), [(False, "<answer> 3 </answer>"), (True, "3")])
def test_only_the_stop_token_is_left_out_of_the_text(tmp_path: Path, skip: bool, text: str) -> None:
    code = f"def compute_score(solution_str): return float(solution_str == '{text}')\n"
    rewards = manager(RewardModelConfig(skip_special_tokens=skip), custom(tmp_path, code))
    rewards.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    stopped, truncated = sample("<answer> 3 </answer> <eos>"), sample("<answer> 3 </answer>")
    truncated.finish_reason = "length"
    rewards.submit([stopped, truncated]).result()
    assert [stopped.score, truncated.score] == [1, 1]


def test_whatever_a_function_returns_is_plain_data() -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError

    endless: dict[str, object] = {}
    endless["self"] = endless
    found = plain(
        {"n": 10**400, "text": "a\ud800b", "odd": Odd(), "endless": [endless], "yes": True}
    )
    assert found.pop("endless")[0]["self"]["self"]["self"]  # cut off somewhere
    assert found == {"n": "<int>", "text": "a?b", "odd": "<Odd>", "yes": True}


def test_equal_scores_in_the_first_step_are_told_with_two_responses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, last = sample("3 + 8 <eos>"), sample("3 * 8 <eos>", 1)
    first.score, last.score = 0.3, 0.1 + 0.2
    warn_of_equal_scores([first, last], manager())
    line = 60 * "-"
    assert caplog.messages[0].endswith(f"\n{line}\n3 + 8\n{line}\n3 * 8\n{line}")
    assert "all 2 responses of the first step have the score 0.3" in caplog.text
    last.score = 0.4
    warn_of_equal_scores([first, last], manager())
    assert len(caplog.messages) == 1
