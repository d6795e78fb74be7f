import json

import pytest
import torch

from hf_lop import demo
from hf_lop.errors import InvalidInputError
from hf_lop.learning.data import as_messages, model_batches, read_rows, split_rows


@pytest.fixture(scope="module")
def processor():
    return demo.load_model()[1]


@pytest.fixture(scope="module")
def rows():
    return demo.load_data("search", 8)


def test_demo_rows_give_the_demo_s_own_batches(processor, rows):
    ours = next(model_batches(processor, rows, batch_size=8))
    theirs = next(demo.batches(processor, rows, 8, with_answer=True))
    assert set(ours) == set(theirs)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours[name], theirs[name])
    answers = ours["labels"].masked_fill(ours["labels"] == -100, processor.tokenizer.pad_token_id)
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    assert [text.strip() for text in texts] == rows["answer"]


def test_messages_questions_and_lists_are_the_same_chat(rows):
    row = rows[0]
    chat = as_messages(row)
    assert as_messages({"messages": chat}) == as_messages(chat) == chat
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert as_messages({"question": "q", "answer": 3})[1]["content"][0]["text"] == "3"


def test_texts_are_padded_on_the_left_and_cut(processor):
    side = processor.tokenizer.padding_side
    batches = list(
        model_batches(processor, ["what color", {"text": "what shape is at the center"}, "who"], batch_size=2)
    )
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert batches[0]["attention_mask"][0].tolist()[-1] == 1
    assert batches[0]["attention_mask"][0].tolist()[0] == 0
    assert next(model_batches(processor, ["what shape is at"], max_length=2))["input_ids"].shape == (1, 2)
    assert processor.tokenizer.padding_side == side


def test_a_tokenizer_takes_chats_without_pictures(processor):
    batch = next(model_batches(processor.tokenizer, [{"question": "what color", "answer": "red"}]))
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]).split()[0] == "red"


@pytest.mark.parametrize("row", [{"caption": "a"}, 3, {"text": " "}, [], [{"role": "user"}]])
def test_other_rows_are_refused(processor, row):
    with pytest.raises(InvalidInputError, match="must have messages"):
        next(model_batches(processor, [row]))


def test_parts_are_disjoint_repeatable_and_sized():
    rows = [f"row {index}" for index in range(50)]
    first, second = split_rows(rows, (20, 10), seed=3)
    assert (len(first), len(second), len({*first, *second})) == (20, 10, 30)
    assert split_rows(rows, (20, 10), seed=3) == [first, second]
    assert split_rows(rows, (20, 10), seed=4) != [first, second]
    many = range(2000)
    assert split_rows(many, (200, 100))[0] == split_rows(many, (200, 600, 600))[0]
    for parts in ((0, 5), (40, 20)):
        with pytest.raises(InvalidInputError, match="cannot be split"):
            split_rows(rows, parts)


def test_files(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)))
    (tmp_path / "prose.txt").write_text("one\ntwo\n")
    assert read_rows(str(tmp_path / "data.jsonl"))["text"] == ["row 0", "row 1", "row 2"]
    assert read_rows(str(tmp_path / "prose.txt"))["text"] == ["one", "two"]
    with pytest.raises(InvalidInputError, match="is no file"):
        read_rows(str(tmp_path / "missing.json"))
    with pytest.raises(InvalidInputError, match="no known kind"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("torn.json", '[{"text": "a"'), ("odd.parquet", "no parquet")])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=rf"{name} cannot be read as data"):
        read_rows(str(tmp_path / name))
