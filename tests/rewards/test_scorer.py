import subprocess
import textwrap

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import warm_python
from verl.config.rewards import CustomRewardConfig, OverlongBufferConfig, RewardModelConfig
from verl.config.schema import Config
from verl.protocol import Prompt, Sample
from verl.rewards import RewardError, compute_score
from verl.rewards.scorer import RewardManager, overlong_penalty
from verl.utils.user_function import load_function

WORDS = ["<eos>", "<pad>", "<unk>", "<answer>", "</answer>", "+", "*", "3", "8", "9", "x"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


TOKENIZER = word_tokenizer()


def sample(text: str, index: int = 0, data_source: str = "countdown", truth=None) -> Sample:
    truth = {"target": 24, "numbers": np.array([3, 8])} if truth is None else truth
    prompt = Prompt(
        index, np.array([5]), data_source, truth, {"index": index}, f"a file, row {index}"
    )
    ids = np.array([WORDS.index(word) for word in text.split()], np.int64)
    return Sample(prompt, 0, ids, "stop" if text.endswith("<eos>") else "length")


def custom(tmp_path, code: str, name: str = "compute_score") -> CustomRewardConfig:
    path = tmp_path / "reward.py"
    path.write_text(textwrap.dedent(code))
    return CustomRewardConfig(path=str(path), name=name)


def manager(config=None, function=None, max_response_length=100) -> RewardManager:
    whole = Config(
        reward_model=config or RewardModelConfig(),
        custom_reward_function=function or CustomRewardConfig(),
    )
    whole.data.max_response_length = max_response_length
    return RewardManager(whole, TOKENIZER)


def test_built_in_rule():
    samples = [
        sample("<answer> 3 * 8 </answer> <eos>"),
        sample("<answer> 3 + 8 </answer> <eos>"),
        sample(""),
        sample("<answer> 8 * 3 </answer>"),
    ]
    samples[0].extras["kept"] = 1
    manager().submit(samples).result()
    assert [s.score for s in samples] == [1, 0, 0, 1]
    assert [s.reward for s in samples] == [1, 0, 0, 1]
    assert [s.extras for s in samples] == [
        {"kept": 1, "acc": 1},
        {"acc": 0},
        {"acc": 0},
        {"acc": 1},
    ]
    manager().submit([]).result()
    empty = sample("")
    manager().submit([empty]).result()
    assert empty.extras == {"acc": 0}


@pytest.mark.parametrize("data_source", ["gsm8k", "openai/gsm8k"])
def test_compute_score_chooses_by_data_source(data_source):
    assert compute_score(data_source, "#### 18", "18.0") == {"score": 1.0, "acc": 1.0}
    truth = {"target": 24, "numbers": [3, 8]}
    assert compute_score("countdown", "<answer>3*8</answer>", truth, {"index": 0})["acc"] == 1


def test_unknown_data_source():
    message = r"'sudoku'.*countdown.*gsm8k.*custom_reward_function\.path"
    with pytest.raises(ValueError, match=message):
        compute_score("sudoku", "", None)
    with pytest.raises(RuntimeError, match=message):
        manager().submit([sample("x", data_source="sudoku")]).result()


def test_malformed_ground_truth_names_the_prompt():
    with pytest.raises(RuntimeError, match=r"countdown.*row 7.*ground truth") as caught:
        manager().submit([sample("x", index=7, truth={"target": "24"})]).result()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_custom_function_gets_verls_arguments_and_keeps_the_order(tmp_path, num_workers):
    function = custom(
        tmp_path,
        """
        import time

        def judge(data_source, solution_str, ground_truth, extra_info):
            time.sleep(0.002 * (10 - extra_info["index"]))  # later samples finish first
            return {"score": extra_info["index"], "seen": (data_source, solution_str, ground_truth)}
        """,
        name="judge",
    )
    samples = [sample("3 + 8 <eos>", index, "mine", "truth") for index in range(10)]
    manager(RewardModelConfig(num_workers=num_workers), function).submit(samples).result()
    assert [s.score for s in samples] == list(range(10))
    assert [s.extras["acc"] for s in samples] == list(range(10))
    assert {tuple(s.extras["seen"]) for s in samples} == {("mine", "3 + 8", "truth")}


def test_custom_function_may_wait_in_threads(tmp_path):
    # Twelve calls that wait for each other: with fewer threads the barrier breaks.
    function = custom(
        tmp_path,
        """
        import threading

        barrier = threading.Barrier(12)

        def compute_score(data_source, solution_str, ground_truth, extra_info):
            return barrier.wait(timeout=60) >= 0
        """,
    )
    samples = [sample("x", index) for index in range(12)]
    manager(RewardModelConfig(num_workers=12), function).submit(samples).result()
    assert [s.score for s in samples] == [1] * 12


@pytest.mark.parametrize(
    ("result", "score", "extras"),
    [
        ("0.5", 0.5, {"acc": 0.5}),
        ("True", 1.0, {"acc": 1.0}),
        ("np.float32(0.25)", 0.25, {"acc": 0.25}),
        ("np.bool_(True)", 1.0, {"acc": 1.0}),
        ("{'score': -1}", -1.0, {"acc": -1.0}),
        ("{'score': -1, 'acc': False, 'pred': '7'}", -1.0, {"acc": 0.0, "pred": "7"}),
    ],
)
def test_results(tmp_path, result, score, extras):
    code = f"import numpy as np\ndef compute_score(**args): return {result}\n"
    one = sample("x")
    manager(function=custom(tmp_path, code)).submit([one]).result()
    assert (one.score, one.reward, one.extras) == (score, score, extras)
    assert type(one.score) is float and type(one.extras["acc"]) is float


@pytest.mark.parametrize(
    "result",
    [
        "None",
        "'1'",
        "float('nan')",
        "float('inf')",
        "10**400",
        "[1.0]",
        "{}",
        "{'acc': 1}",
        "{'score': None}",
        "{'score': float('nan')}",
        "{'score': 1, 'acc': 'yes'}",
    ],
)
def test_bad_results_name_their_origin(tmp_path, result):
    function = custom(tmp_path, f"def compute_score(**args): return {result}\n")
    samples = [sample("x", index=7, data_source="mine")]
    with pytest.raises(ValueError, match=r"compute_score of .*reward\.py.*'mine'.*row 7"):
        manager(function=function).submit(samples).result()
    assert samples[0].extras == {}


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_failing_function_is_an_error_and_no_score(tmp_path, num_workers):
    function = custom(
        tmp_path,
        """
        def compute_score(data_source, solution_str, ground_truth, extra_info):
            if extra_info["index"] == 3:
                raise ConnectionError("server gone")
            return 1.0
        """,
    )
    samples = [sample("x", index, "mine") for index in range(8)]
    message = r"compute_score of .*reward\.py.*'mine'.*row 3.*ConnectionError: server gone"
    with pytest.raises(RuntimeError, match=message) as caught:
        manager(RewardModelConfig(num_workers=num_workers), function).submit(samples).result()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert all(s.extras == {} for s in samples)


def test_custom_function_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        manager(function=CustomRewardConfig(path=str(tmp_path / "absent.py")))
    with pytest.raises(ValueError, match=r"custom_reward_function\.name=judge"):
        manager(function=custom(tmp_path, "compute_score = 1", name="judge"))
    with pytest.raises(ValueError, match="no function of this name"):
        manager(function=custom(tmp_path, "compute_score = 1"))
    with pytest.raises(ValueError, match="can't be imported: ModuleNotFoundError"):
        manager(function=custom(tmp_path, "import a_module_that_is_not_there"))
    with pytest.raises(ValueError, match="can't be imported: SyntaxError"):
        manager(function=custom(tmp_path, "def"))
    (tmp_path / "reward.txt").write_text("")
    with pytest.raises(ValueError, match="not a Python file"):
        load_function("custom_reward_function", str(tmp_path / "reward.txt"), "compute_score")


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0), (60, 0), (80, 0), (81, -0.025), (85, -0.125), (90, -0.25), (100, -0.5)],
)
def test_overlong_penalty(length, penalty):
    buffer = OverlongBufferConfig(enable=True, len=20, penalty_factor=0.5)
    assert overlong_penalty(length, 100, buffer) == pytest.approx(penalty)


def test_dapo_punishes_the_reward_only():
    buffer = OverlongBufferConfig(enable=True, len=4, penalty_factor=1.0, log=True)
    config = RewardModelConfig(reward_manager="dapo", overlong_buffer=buffer)
    short = sample("<answer> 3 * 8 </answer>")  # 5 tokens, the ramp goes from 4 to 8
    long = sample("x x <answer> 3 * 8 </answer> <eos>")
    none = sample("x <eos>")
    manager(config, max_response_length=8).submit([short, long, none]).result()
    assert (short.score, short.reward) == (1, 0.75)
    assert (long.score, long.reward) == (1, 0)
    assert (none.score, none.reward) == (0, 0)
    assert long.extras == {"acc": 1.0, "overlong_reward": -1.0}
    assert none.extras == {"acc": 0.0, "overlong_reward": 0.0}


def test_the_punishment_is_for_the_whole_response():
    buffer = OverlongBufferConfig(enable=True, len=4, penalty_factor=1.0)
    config = RewardModelConfig(reward_manager="dapo", overlong_buffer=buffer)
    one = sample("x x <answer> 3 * 8 </answer> <eos>")
    one.loss_mask = np.array([True] * 2 + [False] * 6)
    manager(config, max_response_length=8).submit([one]).result()
    assert (one.score, one.reward) == (1, 0)


def test_dapo_without_buffer():
    one = sample("<answer> 3 * 8 </answer>")
    manager(RewardModelConfig(reward_manager="dapo"), max_response_length=5).submit([one]).result()
    assert (one.reward, one.extras) == (1, {"acc": 1})


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("way", ["", "async "])
@pytest.mark.parametrize("code", ["exit(3)", "raise KeyboardInterrupt"])
def test_a_function_that_ends_the_process_is_an_error_like_any_other(tmp_path, threads, code, way):
    function = custom(tmp_path, f"{way}def compute_score(**arguments):\n    {code}\n")
    rewards = manager(RewardModelConfig(num_workers=threads), function)
    with pytest.raises(RewardError, match=r"SystemExit|KeyboardInterrupt"):
        rewards.submit([sample("3")]).result(timeout=60)
    rewards.close()


def test_an_async_function_is_awaited(tmp_path):
    code = """
    import asyncio

    async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        await asyncio.sleep(0.01)
        return float(solution_str)
    """
    samples = [sample("3"), sample("8")]
    rewards = manager(RewardModelConfig(num_workers=1), custom(tmp_path, code))
    rewards.submit(samples).result()
    rewards.close()
    assert [s.score for s in samples] == [3, 8]


def test_what_cannot_be_scored_is_named_before_anything_starts(tmp_path):
    prompts = [sample("3").prompt, sample("3", 7, "gpqa", "many").prompt]
    with pytest.raises(
        ValueError,
        match=r"a file, row 7, key 'reward_model': the ground truth of gpqa must be a letter",
    ):
        manager().connect(prompts, tmp_path)
    with pytest.raises(ValueError, match="'sudoku'"):
        manager().connect([sample("3", data_source="sudoku").prompt], tmp_path)
    manager().connect([sample("3").prompt], tmp_path)  # needs no server
    dapo = [sample("3", data_source=name, truth="34").prompt for name in ("math_dapo", "aime25")]
    manager().connect(dapo, tmp_path)  # neither
    with pytest.raises(ValueError, match=r"row 5, key 'reward_model': the ground truth of math"):
        manager().connect([sample("3", 5, "lighteval/MATH", [34]).prompt], tmp_path)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("taco", "programs are not run"),
        ("hiyouga/geometry3k", "there are only text models"),
        ("searchR1_hotpotqa", "nothing is searched"),
    ],
)
def test_what_verl_judges_by_other_means_is_named_before_anything_starts(tmp_path, source, why):
    message = rf"a file, row 0, key 'data_source': no reward .*'{source}': {why}; set custom_reward"
    with pytest.raises(ValueError, match=message):
        manager().connect([sample("3", data_source=source).prompt], tmp_path)


HANGING = {
    "in a thread": "time.sleep(3600)",
    "as a task": "await asyncio.sleep(3600)",
    "in a task that blocks": "time.sleep(3600); await asyncio.sleep(0)",
}


@pytest.mark.parametrize("how", HANGING)
def test_a_function_that_hangs_is_an_error_that_names_the_prompt(tmp_path, how):
    """The time of a call counts, not that of those that wait for their turn."""
    kind, sleep = ("def", "time.sleep(0.1)")
    if "await" in HANGING[how]:
        kind, sleep = ("async def", "await asyncio.sleep(0.1)")
    code = f"""
    import asyncio, time

    {kind} compute_score(solution_str):
        if solution_str == "8":
            {HANGING[how]}
        {sleep}
        return 1.0
    """
    function = custom(tmp_path, code)
    function.timeout_s = 1.0
    rewards = manager(RewardModelConfig(num_workers=1), function)
    rewards.submit([sample("3") for _ in range(15)]).result()
    with pytest.raises(
        RewardError, match=r"reward\.py.*row 7.*no answer after 1 s.*reward_function\.timeout_s"
    ):
        rewards.submit([sample("8", 7)]).result(timeout=60)
    rewards.close()


def test_async_functions_that_compute_have_a_time_limit_each(tmp_path):
    """Eight calls of 0.3 seconds, which block one another, with a limit of one second."""
    code = """
    import time

    async def compute_score(solution_str, extra_info=None, **others):
        time.sleep(0.3)
        return 1.0
    """
    function = custom(tmp_path, code)
    function.timeout_s = 1.0
    rewards = manager(RewardModelConfig(num_workers=8), function)
    rewards.submit([sample("3") for _ in range(8)]).result()
    rewards.close()


@pytest.mark.parametrize("way", ["", "async "])
def test_a_manager_that_is_closed_ends_no_process(tmp_path, way):
    """Though calls of it still run."""
    code = f"import time\n{way}def compute_score(**arguments):\n    time.sleep(1)\n    return 1.0\n"
    custom(tmp_path, code)
    program = f"""
    import time
    from tests.rewards.test_scorer import manager, sample
    from verl.config.schema import CustomRewardConfig

    function = CustomRewardConfig(path="{tmp_path}/reward.py", name="compute_score", timeout_s=0.5)
    rewards = manager(function=function)
    futures = rewards.submit([sample("3"), sample("8")])
    time.sleep(0.2)
    rewards.close()
    time.sleep(1.5)
    """
    command = [warm_python(), "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_function_that_never_gives_the_lock_back_ends_the_process(tmp_path):
    """A regular expression that backtracks, as rewards have them; no thread of Python's runs."""
    code = """
    import re

    def compute_score(solution_str, extra_info=None, **others):
        return float(bool(re.fullmatch("(x+x+)+y", "x" * 60)))
    """
    custom(tmp_path, code)
    program = f"""
    from tests.rewards.test_scorer import manager, sample
    from verl.config.schema import CustomRewardConfig

    function = CustomRewardConfig(path="{tmp_path}/reward.py", name="compute_score", timeout_s=1)
    manager(function=function).submit([sample("3")]).result()
    """
    command = [warm_python(), "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Timeout (0:00:02)" in result.stderr and "reward.py" in result.stderr


def test_a_timeout_of_the_functions_own_is_its_error(tmp_path):
    code = "def compute_score(**arguments):\n    raise TimeoutError('of mine')\n"
    rewards = manager(function=custom(tmp_path, code))
    with pytest.raises(RewardError, match=r"TimeoutError: of mine$"):
        rewards.submit([sample("3")]).result(timeout=60)
    rewards.close()


def test_a_function_that_raises_stop_iteration_is_an_error(tmp_path):
    rewards = manager(
        function=custom(tmp_path, "def compute_score(**arguments):\n    next(iter([]))\n")
    )
    with pytest.raises(RewardError, match="StopIteration"):
        rewards.submit([sample("3")]).result(timeout=60)
    rewards.close()


def test_a_ground_truth_of_the_wrong_type_is_named_with_its_place(tmp_path):
    prompts = [sample("3").prompt, sample("3", 7).prompt, sample("3", 8, "gsm8k", "many").prompt]
    with pytest.raises(ValueError, match=r"^a file, row 8, key 'reward_model': .* gsm8k must be"):
        manager().connect(prompts, tmp_path)
