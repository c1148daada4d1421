import importlib.util
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[2] / "examples/data_preprocess/gsm8k.py"
spec = importlib.util.spec_from_file_location("gsm8k_preprocess", SCRIPT)
gsm8k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm8k)

EGGS = {"question": "How many eggs?", "answer": "16 - 7 = <<16-7=9>>9, twice.\n#### 18"}
MONEY = {"question": "How much?", "answer": "A lot.\n#### 1,250,000"}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def convert(tmp_path, *rows, args=()):
    """Rows of train.parquet."""
    source = write_jsonl(tmp_path / "train.jsonl", *rows)
    gsm8k.main(["--train_file", source, "--local_dir", str(tmp_path / "out"), *args])
    return pq.read_table(tmp_path / "out/train.parquet").to_pylist()


def test_row_has_the_shape_of_verl(tmp_path):
    first, second = convert(tmp_path, EGGS, MONEY)
    assert first == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"How many eggs? {gsm8k.INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "18"},
        "extra_info": {"split": "train", "index": 0, **EGGS},
    }
    assert "step by step" in gsm8k.INSTRUCTION and '"####"' in gsm8k.INSTRUCTION
    assert second["reward_model"]["ground_truth"] == "1250000"
    assert second["extra_info"]["index"] == 1


def test_only_given_files_are_converted_and_limit_counts_per_file(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", MONEY, EGGS)
    rows = convert(tmp_path, EGGS, EGGS, MONEY, args=["--limit", "1"])
    assert len(rows) == 1 and not (tmp_path / "out/test.parquet").exists()
    gsm8k.main(["--test_file", test, "--local_dir", str(tmp_path / "out")])
    rows = pq.read_table(tmp_path / "out/test.parquet").to_pylist()
    assert [row["extra_info"]["split"] for row in rows] == ["test", "test"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "q"}', "'answer'"),
        ('{"question": 3, "answer": "#### 1"}', "'question'"),
        ('"text"', "'question'"),
        ('{"question": "q", "answer": "eighteen"}', "'####'"),
        ('{"question": "q", "answer": "eighteen ####"}', "'####'"),
        ("{", "not JSON"),
    ],
)
def test_unusable_line_is_named(tmp_path, line, problem):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(EGGS) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ") + f".*{problem}"):
        gsm8k.main(["--train_file", str(path), "--local_dir", str(tmp_path)])


def test_empty_missing_and_zero(tmp_path, capsys):
    with pytest.raises(ValueError, match="no problems for train"):
        convert(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        gsm8k.main(["--train_file", str(tmp_path / "none.jsonl"), "--local_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        gsm8k.main(["--limit", "0"])
    assert "--limit must be at least 1" in capsys.readouterr().err


def test_hub_set_when_no_file_is_given(tmp_path, monkeypatch):
    splits = {"train": [EGGS, MONEY], "test": [MONEY]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset, split: splits[split])
    gsm8k.main(["--local_dir", str(tmp_path)])
    for split, problems in splits.items():
        rows = pq.read_table(tmp_path / f"{split}.parquet").to_pylist()
        assert [row["extra_info"]["question"] for row in rows] == [p["question"] for p in problems]


def test_hub_set_that_cant_be_had_names_the_remedy(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"no route to host.*--train_file"):
        gsm8k.main(["--local_dir", str(tmp_path)])
