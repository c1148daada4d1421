"""What data scripts and reward functions import from verl."""

import pytest

from verl.utils import hf_tokenizer
from verl.utils.fs import copy_to_local
from verl.utils.hdfs_io import copy, exists, makedirs
from verl.utils.reward_score import (
    countdown,
    default_compute_score,
    gsm8k,
    math,
    math_dapo,
    math_reward,
)


def test_a_folder_is_copied_into_one_that_was_just_made(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text("rows")
    target = str(tmp_path / "there" / "data")
    makedirs(target)
    assert exists(target) and not exists(target + "/train.parquet")
    assert copy(src=str(tmp_path / "data"), dst=target) == target
    assert (tmp_path / "there" / "data" / "train.parquet").read_text() == "rows"
    assert copy(target + "/train.parquet", str(tmp_path)) == str(tmp_path / "train.parquet")
    with pytest.raises(FileExistsError):
        makedirs(target)
    makedirs(target, exist_ok=True)


@pytest.mark.parametrize("function", [exists, makedirs, copy_to_local, lambda p: copy(".", p)])
def test_hdfs_is_one_line(function):
    with pytest.raises(ValueError, match=r"^hdfs://a/b: HDFS is neither .*`hdfs dfs -put`$"):
        function("hdfs://a/b")


def test_local_files_are_where_they_are():
    assert copy_to_local("a/b.parquet", cache_dir="c", use_shm=True) == "a/b.parquet"


def test_a_tokenizer_pads_with_its_end_token_if_it_names_no_other(tiny_model, tmp_path):
    tokenizer = hf_tokenizer(tiny_model)
    assert tokenizer.pad_token_id is not None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert hf_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token
    assert hf_tokenizer(str(tmp_path), correct_pad_token=False).pad_token is None


@pytest.mark.parametrize("module", [math, math_reward])
def test_data_scripts_take_boxes_apart(module):
    text = r"First $\boxed{1}$, then $\boxed{\frac{3}{4}}$."
    assert module.last_boxed_only_string(text) == r"\boxed{\frac{3}{4}}"
    assert module.remove_boxed(module.last_boxed_only_string(text)) == r"\frac{3}{4}"
    assert module.remove_boxed(module.last_boxed_only_string(r"it is \boxed 5.")) == "5"
    assert module.last_boxed_only_string("none") is None
    for wrong in (None, "5", r"\boxed{5}.", r"\boxed{1}\boxed{2}"):
        with pytest.raises(ValueError, match="not one box"):
            module.remove_boxed(wrong)
    assert module.compute_score(text, "3/4") == 1
    assert module.is_equiv(r"\dfrac34", "3/4") and module.is_equiv(None, None)
    assert not module.is_equiv("3", None)


def test_scores_are_those_that_verl_gives():
    assert gsm8k.compute_score("#### 1,008", "1008", score=2.0) == 2
    assert gsm8k.compute_score("#### 7", "1008", format_score=0.1) == 0.1
    assert gsm8k.compute_score("7", "1008", format_score=0.1) == 0
    assert gsm8k.compute_score("it is 1008 apples", "1008", method="flexible") == 1
    assert gsm8k.extract_solution("#### $1,008") == "1008"
    assert gsm8k.extract_solution("none") is None
    truth = {"target": 24, "numbers": [3, 8]}
    scores = [
        countdown.compute_score(text, truth, format_score=0.1)
        for text in ("<answer>3*8</answer>", "<answer>3+8</answer>", "3*8")
    ]
    assert scores == [1, 0.1, 0]
    dapo = {"score": 1.0, "acc": 1.0, "pred": "5"}
    assert math_dapo.compute_score("Answer: 5", "5") == dapo
    assert math_dapo.compute_score(r"so \boxed{5}", "5", strict_box_verify=True) == dapo
    assert math_dapo.compute_score("Answer: 5", "5", strict_box_verify=True)["score"] == -1


def test_the_default_score_is_a_number_or_dapos_dict():
    assert default_compute_score("openai/gsm8k", "#### 5", "5", sandbox_fusion_url=None) == 1.0
    assert default_compute_score("lighteval/MATH", r"\boxed{5}", "5", {"index": 0}) == 1.0
    assert default_compute_score("aime24", "Answer: 4", "5")["score"] == -1
    with pytest.raises(ValueError, match="programs are not run"):
        default_compute_score("apps", "print(1)", "{}")
