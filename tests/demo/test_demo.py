"""The embedded demo: its data are what they claim, its model loads offline and answers."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from hf_lop import demo
from hf_lop.demo.scenes import KINDS, OWNERS, draw_scene
from hf_lop.errors import InvalidInputError, MissingDependencyError


@pytest.fixture(scope="module")
def loaded():
    return demo.load_model()


def pictures(split, n=40):
    return {row["image"].tobytes() for row in demo.load_data(split, n)}


def test_import_is_light():
    code = "import sys, hf_lop.demo; print({'torch', 'transformers', 'PIL', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_scenes_come_from_their_name():
    first, again, other = draw_scene("a"), draw_scene("a"), draw_scene("b")
    assert first.things == again.things
    assert first.questions == again.questions
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert [question.kind for question in first.questions] == list(KINDS)
    assert len(OWNERS) == 432


def test_rows():
    data = demo.load_data("calibration", 8)
    assert data.column_names == ["image", "question", "answer", "category"]
    assert data["category"] == ["perception", "perception", "cognition", "cognition"] * 2
    assert data[0]["image"].size == (84, 84)
    assert data[0]["image"].tobytes() == data[3]["image"].tobytes() == draw_scene("calibration/0").image.tobytes()
    assert data[3]["question"] == "What is the price of the northwest plus the north object?"
    assert data[3]["answer"] == "4"


def test_splits_have_their_sizes_and_share_no_picture():
    assert {split: len(demo.load_data(split)) for split in demo.SPLITS} == demo.SPLITS
    calibration, search, report = (pictures(split) for split in demo.SPLITS)
    trained = {draw_scene(f"train/answer/0/{row}").image.tobytes() for row in range(24)}
    assert len(calibration | search | report | trained) == 10 + 10 + 10 + 24


def test_splits_are_the_same_every_time_and_at_every_length():
    assert demo.load_data("search", 6).to_list() == demo.load_data("search", 40).to_list()[:6]


@pytest.mark.parametrize(("split", "n"), [("train", None), ("report", 0)])
def test_bad_split(split, n):
    with pytest.raises(InvalidInputError, match=r"calibration, search, report|n is 0"):
        demo.load_data(split, n)


@pytest.mark.parametrize("load", [demo.load_model, lambda: demo.load_data("report", 1)])
def test_missing_package_names_the_extra(monkeypatch, load):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'torchvision.*pip install "hf-lop\[demo\]"'):
        load()


def test_model_loads_whole_through_the_auto_classes():
    model, info = AutoModelForImageTextToText.from_pretrained(demo.MODEL_DIR, output_loading_info=True)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoProcessor.from_pretrained(demo.MODEL_DIR)).__name__ == "Qwen2_5_VLProcessor"


def test_assets_hold_no_path_of_a_machine():
    for file in demo.MODEL_DIR.iterdir():
        content = file.read_bytes()
        assert not any(word in content for word in (b"/home", b"/tmp", b"/root", b"_name_or_path")), file.name


def test_model_answers_pictures_it_never_saw(loaded):
    report = demo.load_data("report", 100)
    scores = demo.accuracy(demo.answer(*loaded, report), report)
    assert scores["all"] > 0.9
    assert set(scores) == {"all", "perception", "cognition"}


def test_accuracy_counts_exact_matches():
    data = demo.load_data("report", 4)
    answers = [*data["answer"][:3], "nobody"]
    assert demo.accuracy(answers, data) == {"all": 0.75, "perception": 1.0, "cognition": 0.5}
    with pytest.raises(InvalidInputError, match="1 answers for 4 questions"):
        demo.accuracy(["red"], data)


def test_batches_label_the_answer_and_its_end(loaded):
    model, processor = loaded
    data = demo.load_data("search", 5)
    full, rest = demo.batches(processor, data, batch_size=4, with_answer=True)
    assert len(rest["input_ids"]) == 1
    assert full["pixel_values"].shape == (4 * 36, 1176)
    taught = full["labels"] != -100
    assert taught.sum(1).tolist() == [2] * 4
    texts = processor.batch_decode(full["labels"][taught].view(4, 2))
    assert texts == [f"{answer} <|im_end|>" for answer in data["answer"][:4]]
    with torch.inference_mode():
        assert model(**full).loss < 0.3


def test_padding_does_not_change_an_answer(loaded):
    data = demo.load_data("search", 8)
    assert demo.answer(*loaded, data, batch_size=8) == demo.answer(*loaded, data, batch_size=1)
