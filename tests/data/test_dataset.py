import json
import logging
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from verl.config.base import SFTDataConfig
from verl.config.schema import DataConfig
from verl.data.dataset import PromptOrder, load_prompts, load_sft_rows

WORDS = ["<unk>", "<eos>", "a", "b", "c", "d", "e", "<user>", "<system>", "<assistant>"]
UNK, EOS, A, B, C, D, E, USER, SYSTEM, ASSISTANT = range(10)
TEMPLATE = """
{%- for m in messages -%}
  {%- if m.role == 'bad' -%}{{ raise_exception('unknown role bad') }}{%- endif -%}
  {{ '<' + m.role + '> ' + m.content + ' ' }}
  {%- if m.name is defined -%}{{ 'named ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""


def make_tokenizer(chat_template=TEMPLATE, eos="<eos>", **kwargs):
    vocab = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Many tokenizers frame a text by special tokens unless they are told not to.
    words.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token=eos, **kwargs
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def user(text):
    return [{"role": "user", "content": text}]


def row(prompt, **columns):
    reward_model = {"style": "rule", "ground_truth": "18"}
    return {"prompt": prompt, "data_source": "s", "reward_model": reward_model, **columns}


def write(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def plain(**keys):
    return DataConfig(apply_chat_template=False, **keys)


def ids_of(prompts):
    return [p.token_ids.tolist() for p in prompts]


def raises(*parts, error=ValueError):
    """The message has all `parts`, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def with_bos(always: bool):
    """A tokenizer with a beginning-of-sequence token, which its own call adds, or does not."""
    tokenizer = make_tokenizer(bos_token="<system>")
    first = "<system> " if always else ""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A <eos>", special_tokens=[("<eos>", EOS), ("<system>", SYSTEM)]
    )
    return tokenizer


@pytest.mark.parametrize("always", [True, False])
def test_string_prompts_begin_as_the_tokenizer_has_it(tmp_path, always):
    path = write(tmp_path / "x.parquet", row("a b"), row("<system> a"))
    mine = [[SYSTEM, A, B], [SYSTEM, A]] if always else [[A, B], [SYSTEM, A]]
    for add_bos, expected in (
        (None, mine),
        (True, [[SYSTEM, A, B], [SYSTEM, A]]),
        (False, [[A, B], [SYSTEM, A]]),
    ):
        assert ids_of(load_prompts(path, plain(add_bos=add_bos), with_bos(always))) == expected
    rows = write(tmp_path / "sft.parquet", {"prompt": "a", "response": "b"})
    (sample,) = load_sft_rows(sft_config(rows), with_bos(always))
    assert sample.prompt.token_ids.tolist() == ([SYSTEM, A] if always else [A])
    assert sample.response_ids.tolist() == [B, EOS]


def test_chat_messages_begin_as_the_template_has_it(tmp_path):
    path = write(tmp_path / "x.parquet", row(user("a")))
    chat = [USER, A, ASSISTANT]
    for add_bos, expected in ((None, chat), (True, [SYSTEM, *chat]), (False, chat)):
        assert ids_of(load_prompts(path, DataConfig(add_bos=add_bos), with_bos(True))) == [expected]
    tokenizer = with_bos(True)
    tokenizer.chat_template = "<system> " + TEMPLATE  # has one already
    assert ids_of(load_prompts(path, DataConfig(add_bos=True), tokenizer)) == [[SYSTEM, *chat]]
    with raises("data.add_bos=True", "has no beginning-of-sequence token"):
        load_prompts(path, DataConfig(add_bos=True), make_tokenizer())


def test_tokens_that_the_model_does_not_have_are_named(tmp_path):
    path = write(tmp_path / "x.parquet", row("a b"), row("a e"))
    assert len(load_prompts(path, plain(), make_tokenizer(), num_embeddings=E + 1)) == 2
    with raises("x.parquet, row 1, key 'prompt'", f"token {E}, but the model has {E}"):
        load_prompts(path, plain(), make_tokenizer(), num_embeddings=E)
    rows = write(tmp_path / "sft.parquet", {"prompt": "a", "response": "b d"})
    with raises("sft.parquet, row 0, key 'response'", f"token {D}, but the model has {D}"):
        load_sft_rows(sft_config(rows), make_tokenizer(), num_embeddings=D)
    with raises(f"the tokenizer ends with token {EOS}, but the model has {EOS}"):
        load_sft_rows(sft_config(rows), make_tokenizer(), num_embeddings=EOS)


# ------------------------------------------------------------------------------------- load_prompts


def test_chat_messages_are_rendered_with_the_generation_prompt(tmp_path):
    messages = [{"role": "system", "content": "c"}, {"role": "user", "content": "a b"}]
    path = write(tmp_path / "x.parquet", row(messages), row(user("d")))
    prompts = load_prompts(path, DataConfig(), make_tokenizer())
    assert ids_of(prompts) == [[SYSTEM, C, USER, A, B, ASSISTANT], [USER, D, ASSISTANT]]
    assert all(p.token_ids.dtype == np.int64 and p.token_ids.ndim == 1 for p in prompts)


def test_tokens_equal_those_of_the_tokenizers_own_chat_tokenization(tmp_path):
    tokenizer = make_tokenizer()
    (prompt,) = load_prompts(
        write(tmp_path / "x.parquet", row(user("a b e"))), DataConfig(), tokenizer
    )
    own = tokenizer.apply_chat_template(user("a b e"), add_generation_prompt=True)
    assert prompt.token_ids.tolist() == own["input_ids"]


def test_message_fields_of_other_rows_stay_absent(tmp_path):
    named = [{"role": "user", "content": "a", "name": "n"}]
    path = write(tmp_path / "x.parquet", row(named), row(user("a")))
    first, second = load_prompts(path, DataConfig(), make_tokenizer())
    assert first.token_ids.tolist() == [USER, A, UNK, ASSISTANT]
    assert second.token_ids.tolist() == [USER, A, ASSISTANT]


def test_several_files_are_numbered_through_and_values_are_plain_python(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    truth = {"style": "rule", "ground_truth": {"target": 24, "numbers": [4, 6]}}
    write(tmp_path / "1.parquet", row("a b", reward_model=truth, extra_info={"tags": [1, 2]}))
    write(tmp_path / "2.parquet", row("c"), row("d e"))
    files = ["~/1.parquet", tmp_path / "2.parquet"]
    prompts = load_prompts(files, plain(), make_tokenizer())
    assert ids_of(prompts) == [[A, B], [C], [D, E]]
    assert [p.index for p in prompts] == [0, 1, 2]
    assert prompts[0].ground_truth == {"target": 24, "numbers": [4, 6]}
    assert type(prompts[0].ground_truth["numbers"]) is list
    assert prompts[0].extra_info == {"tags": [1, 2]}
    assert prompts[1].extra_info == {} and prompts[1].ground_truth == "18"
    assert {p.data_source for p in prompts} == {"s"}


def test_pandas_files_with_arrays_in_them(tmp_path):
    pd = pytest.importorskip("pandas")
    truth = {"style": "rule", "ground_truth": {"target": 7, "numbers": np.array([3, 4])}}
    frame = pd.DataFrame([row(np.array(user("a"), dtype=object), reward_model=truth)])
    frame.to_parquet(tmp_path / "x.parquet")
    (prompt,) = load_prompts(str(tmp_path / "x.parquet"), DataConfig(), make_tokenizer())
    assert prompt.token_ids.tolist() == [USER, A, ASSISTANT]
    assert json.loads(json.dumps(prompt.ground_truth)) == {"target": 7, "numbers": [3, 4]}


def test_column_names_are_configurable(tmp_path):
    columns = {"question": "a", "task": "t", "reward_model": {"ground_truth": 3}}
    path = write(tmp_path / "x.parquet", columns)
    config = plain(prompt_key="question", reward_fn_key="task")
    (prompt,) = load_prompts(path, config, make_tokenizer())
    assert (prompt.data_source, prompt.ground_truth) == ("t", 3)


def test_the_columns_of_dapos_data(tmp_path):
    dapo = row(user("a b"), data_source="math_dapo", ability="MATH", extra_info={"index": "9a-1"})
    # Open-R1's copy has the problem alone as `prompt`, and the messages beside it.
    open_r1 = dapo | {"prompt": "a", "source_prompt": dapo["prompt"], "solution": "34"}
    for name, columns, config in (
        ("dapo", dapo, DataConfig()),
        ("open_r1", open_r1, DataConfig(prompt_key="source_prompt")),
    ):
        (prompt,) = load_prompts(write(tmp_path / name, columns), config, make_tokenizer())
        assert prompt.token_ids.tolist() == [USER, A, B, ASSISTANT]
        assert (prompt.data_source, prompt.ground_truth) == ("math_dapo", "18")
        assert prompt.extra_info == {"index": "9a-1"}


def test_more_rows_than_one_tokenizer_batch(tmp_path):
    words = "abcde"
    path = write(tmp_path / "x.parquet", *(row(words[i % 5]) for i in range(2003)))
    prompts = load_prompts(path, plain(), make_tokenizer())
    assert ids_of(prompts) == [[A + i % 5] for i in range(2003)]


def test_overlong_prompts_are_dropped_and_counted(tmp_path, caplog):
    path = write(tmp_path / "x.parquet", row("a b"), row("a b c"), row("d"))
    config = plain(max_prompt_length=2, filter_overlong_prompts=True)
    with caplog.at_level(logging.INFO):
        prompts = load_prompts(path, config, make_tokenizer())
    assert [p.index for p in prompts] == [0, 2]
    assert "1 of 3 prompts are longer than data.max_prompt_length=2" in caplog.text
    path = write(tmp_path / "y.parquet", row("a b c"), row("a b c"))
    with raises(path, "2 of 2", "data.max_prompt_length=2", "leaves none", "raise"):
        load_prompts(path, config, make_tokenizer())


@pytest.mark.parametrize(
    ("side", "kept"), [("left", [C, D, E]), ("right", [A, B, C]), ("middle", [A, D, E])]
)
def test_overlong_prompts_are_cut(tmp_path, side, kept):
    path = write(tmp_path / "x.parquet", row("a b c d e"), row("d"))
    config = plain(max_prompt_length=3, truncation=side)  # the middle: one left, two right
    assert ids_of(load_prompts(path, config, make_tokenizer())) == [kept, [D]]


def test_overlong_prompt_is_an_error_by_default(tmp_path):
    path = write(tmp_path / "x.parquet", row("a"), row("a b c"))
    with raises(path, "row 1", "'prompt'", "3 tokens", "max_prompt_length=2", "filter_overlong"):
        load_prompts(path, plain(max_prompt_length=2), make_tokenizer())


def test_the_models_own_limit_is_not_ours(tmp_path, caplog):
    path = write(tmp_path / "x.parquet", row("a b c d"))
    (prompt,) = load_prompts(path, plain(), make_tokenizer(model_max_length=2))
    assert len(prompt.token_ids) == 4
    assert not caplog.records


def test_prompt_of_the_wrong_kind_names_the_remedy(tmp_path):
    strings = write(tmp_path / "s.parquet", row("a b"))
    chats = write(tmp_path / "c.parquet", row(user("a b")))
    with raises(strings, "row 0", "'prompt'", "data.apply_chat_template=False"):
        load_prompts([chats, strings], DataConfig(), make_tokenizer())
    with raises(chats, "row 0", "'prompt'", "data.apply_chat_template=True"):
        load_prompts([strings, chats], plain(), make_tokenizer())


def test_tokenizer_without_chat_template(tmp_path):
    path = write(tmp_path / "x.parquet", row(user("a")))
    with raises(path, "row 0", "'prompt'", "no chat template", "data.tokenizer"):
        load_prompts(path, DataConfig(), make_tokenizer(chat_template=None))


def test_chat_template_that_rejects_a_row(tmp_path):
    path = write(tmp_path / "x.parquet", row(user("a")), row([{"role": "bad", "content": "a"}]))
    with raises(path, "row 1", "'prompt'", "rejects", "unknown role bad"):
        load_prompts(path, DataConfig(), make_tokenizer())


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}, "a"])
def test_malformed_messages(tmp_path, message):
    path = write(tmp_path / "x.parquet", row([message]))
    with raises(path, "row 0", "'prompt'", "role", "content"):
        load_prompts(path, DataConfig(), make_tokenizer())


@pytest.mark.parametrize(("empty", "config"), [("", plain()), ("  ", plain()), ([], DataConfig())])
def test_empty_prompt(tmp_path, empty, config):
    full = "a" if isinstance(empty, str) else user("a")
    path = write(tmp_path / "x.parquet", row(full), row(empty))
    with raises(path, "row 1", "'prompt'", "empty"):
        load_prompts(path, config, make_tokenizer())


@pytest.mark.parametrize(
    ("key", "values", "number"),
    [
        ("reward_model", [{"ground_truth": "18"}, {"ground_truth": None}], 1),
        ("reward_model", [{"ground_truth": "18"}, None], 1),
        ("reward_model", [{"style": "rule"}], 0),
        ("reward_model", ["18"], 0),
        ("data_source", ["s", None], 1),
        ("data_source", [3], 0),
        ("prompt", ["a", None], 1),
        ("extra_info", ["text"], 0),
    ],
)
def test_unusable_value_names_file_row_and_key(tmp_path, key, values, number):
    path = write(tmp_path / "x.parquet", *(row("a") | {key: value} for value in values))
    with raises(path, f"row {number}", repr(key)):
        load_prompts(path, plain(), make_tokenizer())


@pytest.mark.parametrize("column", ["prompt", "data_source", "reward_model"])
def test_missing_column(tmp_path, column):
    path = write(tmp_path / "x.parquet", {k: v for k, v in row("a").items() if k != column})
    with raises(path, repr(column), "no such column"):
        load_prompts(path, plain(), make_tokenizer())


def test_files_that_are_missing_unreadable_or_empty(tmp_path):
    tokenizer = make_tokenizer()
    with raises(tmp_path / "no.parquet", "examples/data_preprocess", error=FileNotFoundError):
        load_prompts(tmp_path / "no.parquet", plain(), tokenizer)
    (tmp_path / "text.parquet").write_text("not parquet")
    with raises(tmp_path / "text.parquet", "not a readable parquet file"):
        load_prompts(tmp_path / "text.parquet", plain(), tokenizer)
    with raises(tmp_path, "not a readable parquet file"):
        load_prompts(tmp_path, plain(), tokenizer)
    table = pa.Table.from_pylist([row("a")])
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with raises(tmp_path / "empty.parquet", "no rows"):
        load_prompts(tmp_path / "empty.parquet", plain(), tokenizer)
    with raises("data.train_files"):
        load_prompts([], plain(), tokenizer)
    with raises("hf download BytedTsinghua-SIA/DAPO-Math-17k --repo", error=FileNotFoundError):
        load_prompts("BytedTsinghua-SIA/DAPO-Math-17k", plain(), tokenizer)


def test_json_is_read_like_parquet(tmp_path):
    rows = [row("a"), row("b\u2028 c", extra_info={"index": 1}), row("d")]
    write(tmp_path / "x.parquet", *rows)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    for name, text in (
        ("x.jsonl", lines + "\n"),
        ("lines.json", lines),
        ("list.json", json.dumps(rows, indent=2)),
    ):
        (tmp_path / name).write_text(text)
        found = load_prompts(tmp_path / name, plain(), make_tokenizer())
        expected = load_prompts(tmp_path / "x.parquet", plain(), make_tokenizer())
        assert ids_of(found) == ids_of(expected)
        assert [p.ground_truth for p in found] == [p.ground_truth for p in expected]
        assert [p.extra_info for p in found] == [{}, {"index": 1}, {}]
        assert found[1].location == f"{tmp_path / name}, row 1"
    both = load_prompts([tmp_path / "x.jsonl", tmp_path / "x.parquet"], plain(), make_tokenizer())
    assert [p.index for p in both] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{'prompt': 1}", "not a readable JSON file"),
        ("[1, 2]", "each row must be an object"),
        ("[]", "no rows"),
        ("", "no rows"),
        ('{"prompt": "a"}', "'data_source': no such column, only prompt"),
        ('{"prompt": "a", "data_source": "s", "reward_model": 1}', "must be a struct"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, text, problem):
    (tmp_path / "x.json").write_text(text)
    with raises(tmp_path / "x.json", problem):
        load_prompts(tmp_path / "x.json", plain(), make_tokenizer())


def test_some_rows_are_the_first_or_a_choice_by_the_seed(tmp_path):
    path = write(tmp_path / "x.parquet", *(row("a", extra_info={"i": i}) for i in range(10)))

    def chosen(max_samples, **keys):
        prompts = load_prompts(path, plain(**keys), make_tokenizer(), max_samples=max_samples)
        assert [p.location for p in prompts] == [
            f"{path}, row {p.extra_info['i']}" for p in prompts
        ]
        return [p.extra_info["i"] for p in prompts]

    assert chosen(3, shuffle=False) == [0, 1, 2]
    # verl's choice: np.random.default_rng(7).choice(10, 3, replace=False)
    assert chosen(3, seed=7) == [7, 5, 6]
    for everything in (-1, 0, 10, 11):
        assert chosen(everything) == list(range(10))


def test_rows_are_chosen_before_long_prompts_are_dropped(tmp_path):
    path = write(tmp_path / "x.parquet", row("a b c"), row("a"), row("b"))
    config = plain(shuffle=False, max_prompt_length=2, filter_overlong_prompts=True)
    assert ids_of(load_prompts(path, config, make_tokenizer(), max_samples=2)) == [[A]]


# ------------------------------------------------------------------------------------ load_sft_rows


def sft_config(path, **keys):
    return SFTDataConfig(train_files=str(path), **keys)


def test_sft_rows_end_with_eos(tmp_path):
    path = write(tmp_path / "x.parquet", {"prompt": "a b", "response": "c"})
    (sample,) = load_sft_rows(sft_config(path, max_length=4), make_tokenizer())
    assert sample.prompt.token_ids.tolist() == [A, B]
    assert sample.response_ids.tolist() == [C, EOS]
    assert sample.response_ids.dtype == np.int32
    assert sample.finish_reason == "stop"


def test_columns_and_beginnings_of_sft_rows_are_configurable(tmp_path):
    path = write(tmp_path / "x.parquet", {"prompt": "c", "question": "a", "answer": "b"})
    keys = {"prompt_key": "question", "response_key": "answer"}
    for add_bos, begin in ((True, [SYSTEM]), (False, [])):
        config = sft_config(path, add_bos=add_bos, **keys)
        (sample,) = load_sft_rows(config, with_bos(not add_bos))
        assert sample.prompt.token_ids.tolist() == [*begin, A]
        assert sample.response_ids.tolist() == [B, EOS]


def test_some_sft_rows_of_json(tmp_path):
    rows = [{"prompt": word, "response": "c"} for word in ("a", "b", "d")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = sft_config(tmp_path / "x.jsonl", train_max_samples=2, shuffle=False)
    assert ids_of([s.prompt for s in load_sft_rows(config, make_tokenizer())]) == [[A], [B]]


def test_sft_rows_that_are_too_long(tmp_path, caplog):
    rows = [{"prompt": "a", "response": "c"}, {"prompt": "a b", "response": "c d"}]
    path = write(tmp_path / "x.parquet", *rows)
    with raises(path, "row 1", "'response'", "2 prompt", "3 response", "max_length=4", "right"):
        load_sft_rows(sft_config(path, max_length=4), make_tokenizer())
    with caplog.at_level(logging.INFO):
        config = sft_config(path, max_length=4, truncation="right")
        whole, cut = load_sft_rows(config, make_tokenizer())
    assert (whole.response_ids.tolist(), whole.finish_reason) == ([C, EOS], "stop")
    assert (cut.response_ids.tolist(), cut.finish_reason) == ([C, D], "length")
    assert "1 of 2 responses were cut" in caplog.text
    with raises(path, "row 1", "max_length=2: raise it"):
        config = sft_config(path, max_length=2, truncation="right")
        load_sft_rows(config, make_tokenizer())


def test_sft_rows_that_cant_be_used(tmp_path):
    good = {"prompt": "a", "response": "b"}
    tokenizer = make_tokenizer()
    for key in ("prompt", "response"):
        path = write(tmp_path / "x.parquet", good, good | {key: ""})
        with raises(path, "row 1", repr(key), "empty"):
            load_sft_rows(sft_config(path), tokenizer)
        path = write(tmp_path / "x.parquet", good, good | {key: None})
        with raises(path, "row 1", repr(key), "null"):
            load_sft_rows(sft_config(path), tokenizer)
        with raises(path, "'text'", "no such column", f"data.{key}_key"):
            load_sft_rows(sft_config(path, **{f"{key}_key": "text"}), tokenizer)
    with raises("no end-of-sequence token", "data.tokenizer"):
        load_sft_rows(sft_config(path), make_tokenizer(eos=None))


# -------------------------------------------------------------------------------------- PromptOrder


def take(order, batches):
    return [order.next_batch() for _ in range(batches)]


def flat(batches):
    return [position for batch in batches for position in batch]


def test_every_prompt_once_an_epoch_in_a_new_order():
    order = PromptOrder(12, batch_size=3, seed=5)
    assert order.steps_per_epoch == 4
    epochs = [flat(take(order, 4)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[2] == np.random.default_rng([5, 2]).permutation(12).tolist()


def test_the_seed_decides_the_order():
    assert take(PromptOrder(50, 10, seed=1), 9) == take(PromptOrder(50, 10, seed=1), 9)
    assert take(PromptOrder(50, 10, seed=1), 9) != take(PromptOrder(50, 10, seed=2), 9)


def test_the_tail_of_an_epoch_is_skipped():
    order = PromptOrder(5, batch_size=2, shuffle=False)
    assert take(order, 4) == [[0, 1], [2, 3], [0, 1], [2, 3]]
    order = PromptOrder(5, batch_size=2, seed=3)
    first = np.random.default_rng([3, 0]).permutation(5)
    second = np.random.default_rng([3, 1]).permutation(5)
    assert flat(take(order, 3)) == [*first[:4], *second[:2]]


def test_epoch_is_that_of_the_next_batch():
    order = PromptOrder(5, batch_size=2)
    epochs = [order.epoch]
    for _ in range(4):
        order.next_batch()
        epochs.append(order.epoch)
    assert epochs == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 8])  # 4 batches an epoch
def test_resuming_continues_identically(taken, shuffle):
    order = PromptOrder(14, batch_size=3, seed=7, shuffle=shuffle)
    take(order, taken)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = PromptOrder(14, batch_size=3, seed=7, shuffle=shuffle)
    take(resumed, 2)  # where it stood before must not matter
    resumed.load_state_dict(state)
    assert resumed.epoch == order.epoch == taken // 4
    assert take(resumed, 10) == take(order, 10)
    assert resumed.state_dict() == order.state_dict()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (PromptOrder(13, 3, seed=7), "the number of training prompts was 14 and is 13"),
        (PromptOrder(14, 2, seed=7), "data.train_batch_size was 3 and is 2"),
        (PromptOrder(14, 3, seed=8), "data.seed was 7 and is 8"),
        (PromptOrder(14, 3, seed=7, shuffle=False), "data.shuffle was True and is False"),
        (PromptOrder(14, 2, 7, batch_key="data.gen_batch_size"), "data.gen_batch_size was 3"),
    ],
)
def test_resuming_another_order_names_what_changed(other, named):
    state = PromptOrder(14, batch_size=3, seed=7).state_dict()
    with raises(named, "trainer.resume_mode=disable"):
        other.load_state_dict(state)


def test_batch_larger_than_the_data():
    with raises("data.train_batch_size=8", "7 training prompts", "lower it"):
        PromptOrder(7, batch_size=8)
    with raises("data.gen_batch_size=8"):
        PromptOrder(7, batch_size=8, batch_key="data.gen_batch_size")
    assert sorted(PromptOrder(7, batch_size=7).next_batch()) == list(range(7))


def test_importing_the_module_does_not_import_heavy_packages():
    heavy = "{'torch', 'transformers', 'pandas', 'datasets'}"
    code = f"import sys, verl.data.dataset; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_the_chat_template_gets_options_systems_and_tools(tmp_path):
    """Tools as schemas, of which a parquet file makes structs with nulls, or as one string."""
    template = "{%- for t in tools or [] -%}<unk> {{ t.name }}{{ t.unit is defined }} {% endfor -%}"
    template += TEMPLATE + "{%- if enable_thinking is defined %} a{% endif -%}"
    tokenizer = make_tokenizer(template)
    texts = []
    tokenizer.apply_chat_template = lambda *args, own=tokenizer.apply_chat_template, **options: (
        texts.append(own(*args, **options)) or texts[-1]
    )
    chat = [{"role": "system", "content": "b"}, *user("a")]
    schemas = [{"name": "x"}, {"name": "y", "unit": "m"}]
    path = write(tmp_path / "x.parquet", row(chat, tools=schemas), row(chat))
    load_prompts(path, DataConfig(), tokenizer)
    tools = "<unk> xFalse <unk> yTrue "
    assert texts == [f"{tools}<system> b <user> a <assistant>", "<system> b <user> a <assistant>"]
    write(path, row(chat, tools='[{"name": "x"}]'))
    config = DataConfig(apply_chat_template_kwargs={"enable_thinking": False})
    load_prompts(path, config, tokenizer)
    assert texts[2:] == ["<unk> xFalse <system> b <user> a <assistant> a"]


def test_a_message_that_calls_tools_needs_no_content(tmp_path):
    template = "{%- for m in messages %}{{ m.content or m.tool_calls[0].name }} {% endfor -%}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "b"}]}
    path = write(tmp_path / "x.parquet", row([*user("a"), call]))
    assert ids_of(load_prompts(path, DataConfig(), make_tokenizer(template))) == [[A, B]]
