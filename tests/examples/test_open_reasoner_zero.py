import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.helpers import make_tokenizer
from verl.config.schema import DataConfig
from verl.data.dataset import load_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "data_preprocess"))

import open_reasoner_zero_nochat as orz

BRACES = r"For $x \in \{1, 2\}$, what is $\frac{x}{{question}}$ %s {0}?"


def train_row(question, answer):
    answer = {"from": "assistant", "ground_truth": {"value": answer}}
    return [{"from": "human", "value": question}, answer]


def eval_row(question, answer):
    return {"prompt": [{"from": "user", "value": question}], "final_answer": answer}


@pytest.fixture
def sources(tmp_path):
    """Two clones with two problems in each source; the flags that name them and the output."""
    zero, r1 = tmp_path / "zero", tmp_path / "r1"
    (zero / "data/eval_data").mkdir(parents=True)
    write_json(zero / "data/orz_math_57k_collected.json", train_row(BRACES, "n = 4"))
    for name in ("math500", "aime2024"):
        rows = eval_row(" What is\n1 + 2?\n", " 3"), eval_row("2 + 2", r"\text{four}")
        write_json(zero / f"data/eval_data/{name}.json", *rows)
    save_suite(r1, "amc", {"problem": ["6 * 7", "1 / 8"], "answer": [42.0, 0.125]})
    answers = [["10^{-3}\n", "0.001\n"], ["7"]]
    save_suite(r1, "minerva", {"problem": ["1 / 1000", "3 + 4"], "answer": answers})
    out = tmp_path / "out"
    flags = ["--open_reasoner_zero", zero, "--understand_r1_zero", r1, "--local_dir", out]
    return zero, r1, out, list(map(str, flags))


def write_json(path, *rows):
    path.write_text(json.dumps(list(rows)))


def save_suite(r1, name, columns):
    Dataset.from_dict(columns).save_to_disk(r1 / "datasets/evaluation_suite" / name)


def rows_of(out, name):
    return pq.read_table(out / f"{name}.parquet").to_pylist()


def test_all_files(sources, capsys):
    *_, out, flags = sources
    orz.main(flags)
    found = {
        path.name: [row["data_source"] for row in rows_of(out, path.stem)] for path in out.iterdir()
    }
    assert found == {
        "train.parquet": ["open_reasoner_zero"],
        "test1.parquet": ["math500"] * 2,
        "test2.parquet": ["aime2024"] * 2,
        "test_amc.parquet": ["amc"] * 2,
        "test_minerva.parquet": ["minerva"] * 2,
    }
    first, second = rows_of(out, "test1")
    assert first == {
        "data_source": "math500",
        "prompt": orz.make_prompt("What is\n1 + 2?"),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"split": "test", "index": 0},
    }
    assert second["extra_info"] == {"split": "test", "index": 1}
    assert second["reward_model"]["ground_truth"] == r"\text{four}"
    assert rows_of(out, "train")[0]["extra_info"] == {"split": "train", "index": 0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}/train.parquet: 1 problems of open_reasoner_zero"
    assert len(lines) == 5


def test_answers_of_amc_and_minerva(sources):
    *_, out, flags = sources
    orz.main([*flags, "--files", "test_amc", "test_minerva"])
    truths = [
        row["reward_model"]["ground_truth"]
        for name in ("test_amc", "test_minerva")
        for row in rows_of(out, name)
    ]
    assert truths == ["42", "0.125", "10^{-3}", "7"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (-4.0, "-4"),
        (-0.0, "0"),
        (17, "17"),
        (0.1, "0.1"),
        (1 / 3, "0.3333333333333333"),
        (2.5e-7, "0.00000025"),
        (1e22, "1" + 22 * "0"),
        ("\n 007 ", "007"),
    ],
)
def test_number_becomes_exact_and_readable_text(answer, text):
    assert orz.ground_truth(answer) == text


def test_prompt_says_what_the_judge_asks_for():
    prompt = orz.make_prompt(f"\n{BRACES}\n")
    preamble, instruction, end = re.split("\nUser: |\nAssistant: ", prompt)
    for tags in ("<think> </think>", "<answer> </answer>"):
        assert tags in preamble
    assert "<answer> </answer>" in instruction and r"\boxed{}" in instruction
    assert instruction.endswith(f":\n{BRACES}")
    assert end == "<think>"


def test_loader_takes_every_file(sources):
    *_, out, flags = sources
    orz.main(flags)
    files = [out / f"{name}.parquet" for name in orz.SOURCES]
    config = DataConfig(apply_chat_template=False)
    tokenizer = make_tokenizer()
    prompts = load_prompts(files, config, tokenizer)
    truths = ["n = 4", "3", r"\text{four}", "3", r"\text{four}", "42", "0.125", "10^{-3}", "7"]
    assert [prompt.ground_truth for prompt in prompts] == truths
    assert [prompt.data_source for prompt in prompts[::2]] == [
        "open_reasoner_zero",
        "math500",
        "aime2024",
        "amc",
        "minerva",
    ]
    two = tokenizer.convert_tokens_to_ids("2")
    text = tokenizer(orz.make_prompt("2 + 2"), add_special_tokens=False)["input_ids"]
    assert prompts[2].token_ids.tolist() == text and text.count(two) == 2


def test_limit_counts_per_file_and_leaves_the_rest_unread(sources):
    zero, _, out, flags = sources
    write_json(zero / "data/eval_data/math500.json", eval_row("2 + 2", "4"), "no problem")
    orz.main([*flags, "--limit", "1"])
    assert {len(rows_of(out, name)) for name in orz.SOURCES} == {1}


def test_missing_sources_are_named_together(sources, tmp_path):
    zero, _, out, flags = sources
    (zero / "data/orz_math_57k_collected.json").unlink()
    missing = [*flags, "--understand_r1_zero", str(tmp_path / "none")]
    with pytest.raises(FileNotFoundError) as error:
        orz.main(missing)
    message = str(error.value)
    for path in (
        zero / "data/orz_math_57k_collected.json",
        tmp_path / "none/datasets/evaluation_suite/amc",
        tmp_path / "none/datasets/evaluation_suite/minerva",
    ):
        assert str(path) in message
    assert "math500" not in message
    for flag, folder in (("open_reasoner_zero", zero), ("understand_r1_zero", tmp_path / "none")):
        assert f"git clone {orz.REPOSITORIES[flag]} {folder}" in message
    assert not out.exists()
    files = message.rpartition(": ")[2].split()
    assert files == ["--files", "test1", "test2"]
    orz.main([*missing, *files])
    assert {path.name for path in out.iterdir()} == {"test1.parquet", "test2.parquet"}


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        orz.main(["--open_reasoner_zero", str(tmp_path), "--files", "test1"])
    assert "understand" not in str(error.value).partition("or name")[0]
    assert "only the others" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("text", "not a question with an answer: text"),
        (eval_row("2 + 2", "4") | {"prompt": []}, "not a question"),
        (eval_row(None, "4"), "not a question"),
        (eval_row(" \n", "4"), "not a question"),
        ({"prompt": [{"from": "user", "value": "2 + 2"}]}, "not a question"),
        (train_row("2 + 2", "4")[:1], "not a question"),
        (eval_row("2 + 2", None), "the answer must be text or a finite number, not None"),
        (eval_row("2 + 2", " "), "the answer must be"),
        (eval_row("2 + 2", []), "the answer must be"),
        (eval_row("2 + 2", True), "the answer must be"),
        (eval_row("2 + 2", float("nan")), "the answer must be"),
        (eval_row("2 + 2", float("inf")), "the answer must be"),
        (eval_row("half of \ud83d", "4"), "surrogates"),
    ],
)
def test_malformed_row_is_named(sources, row, problem):
    zero, _, out, flags = sources
    path = zero / "data/eval_data/math500.json"
    write_json(path, eval_row("1 + 1", "2"), row)
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 1: ") + f".*{problem}"):
        orz.main([*flags, "--files", "test1"])
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("version https://git-lfs.github.com/spec/v1", "not JSON"),
        ("{}", "not a list"),
        ("[]", "no problems"),
    ],
)
def test_file_of_another_kind_is_named(sources, content, problem):
    zero, *_, flags = sources
    path = zero / "data/eval_data/math500.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + problem):
        orz.main([*flags, "--files", "test1"])


def test_malformed_saved_folder_is_named(sources):
    _, r1, _, flags = sources
    save_suite(r1, "amc", {"problem": ["1 + 1", "2 + 2"], "answer": [2.0, None]})
    with pytest.raises(ValueError, match=r"evaluation_suite/amc, row 1: .*not None"):
        orz.main([*flags, "--files", "test_amc"])
    (r1 / "datasets/evaluation_suite/minerva/state.json").unlink()
    with pytest.raises(OSError, match="evaluation_suite/minerva"):
        orz.main([*flags, "--files", "test_minerva"])


def test_failed_run_keeps_the_files_of_the_last_one(sources, monkeypatch):
    *_, out, flags = sources
    orz.main([*flags, "--files", "test1"])
    before = (out / "test1.parquet").read_bytes()

    def interrupted(table, path):
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(orz.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        orz.main([*flags, "--files", "test1"])
    assert (out / "test1.parquet").read_bytes() == before


def test_impossible_flags(capsys):
    for flags, message in ((["--limit", "0"], "at least 1"), (["--files", "test3"], "'test3'")):
        with pytest.raises(SystemExit):
            orz.parse_args(flags)
        assert message in capsys.readouterr().err
