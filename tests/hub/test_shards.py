"""Lazy reading of checkpoints: the right bytes from folders and the Hub, and nothing believed that a repository claims."""

import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, LOPError
from hf_lop.hub.read import repository as hub_files
from hf_lop.hub.read.checkpoint import Shards, open_shards
from hf_lop.hub.read.safetensors import LENGTH, header_length, parse_header
from tests.hub_server import File, Repository, run_python, serve

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).view(4, 3),
    "b.bias": torch.arange(5, dtype=torch.float32),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 3),
}
DATA = b"\0" * 8


def sharded(folder):
    names = {"one.safetensors": ("a.weight", "d"), "two.safetensors": ("b.bias", "c")}
    for file, own in names.items():
        save_file({name: TENSORS[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in names.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def raw(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_rows_of_a_folder_are_those_that_were_saved(tmp_path, layout):
    if layout == "whole":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        sharded(tmp_path)
    with open_shards(tmp_path) as shards:
        assert shards.places.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(shards.rows(name), tensor)
            assert shards.rows(name).dtype == tensor.dtype
        assert torch.equal(shards.rows("a.weight", 1, 3), TENSORS["a.weight"][1:3])
        with pytest.raises(InvalidInputError, match="it has 4"):
            shards.rows("a.weight", 1, 5)
        with pytest.raises(CheckpointMismatchError, match="no tensor 'x'"):
            shards.rows("x")
        with pytest.raises(InvalidInputError, match="has 24"):
            shards.read_into(shards.places["a.weight"], 20, bytearray(5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"\1\0\0", "too few"),
        (raw({}, b"", length=10**15), "header of 1,000,000,000,000,000"),
        (raw(b"{", b""), "too few"),
        (raw(b"[]      ", b""), "JSON list"),
        (raw(b"{'a'}  ", b""), "is damaged"),
        (raw(b"[" * 200_000, b""), "is damaged"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}", b""), "is damaged"),
        (raw(b"\xff\xfe{}", b""), "is damaged"),
        (raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}'), "comes twice"),
        (raw({"a": entry("F33")}), "dtype 'F33'"),
        (raw({"a": entry(["F32"])}), "dtype"),
        (raw({"a": 5}), "it needs a dtype"),
        (raw({"a": entry(shape=(-2,))}), "it needs a dtype"),
        (raw({"a": entry(shape=(2.0,))}), "it needs a dtype"),
        (raw({"a": entry(shape=(True, 2))}), "it needs a dtype"),
        (raw({"a": entry(offsets=(0, 8, 9))}), "it needs a dtype"),
        (raw({"a": entry(shape=(3,))}), "of shape .3. takes 12"),
        (raw({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}), "takes"),
        (raw({"a": entry(offsets=(8, 0))}), "takes"),
        (raw({"a": entry(offsets=(8, 16))}), "leaves a gap"),
        (raw({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}), "overlaps"),
        (raw({"a": entry()}, b"\0" * 7), "has .* bytes, its header describes"),
        (raw({"a": entry()}, b"\0" * 9), "has .* bytes, its header describes"),
        (pickle.dumps({"a": 1}), "pickle"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    ],
)
def test_hostile_files(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        open_shards(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_header_longer_than_the_format_allows_is_not_read():
    with pytest.raises(CheckpointMismatchError, match="100,000,000"):
        header_length("x", struct.pack("<Q", 100_000_001), 10**12)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("/etc/passwd", "no file of the repository"),
        ("../model.safetensors", "no file of the repository"),
        ("a/../../model.safetensors", "no file of the repository"),
        ("a//b.safetensors", "no file of the repository"),
        ("./model.safetensors", "no file of the repository"),
        ("..\\model.safetensors", "no file of the repository"),
        ("C:/model.safetensors", "no file of the repository"),
        ("a\0.safetensors", "no file of the repository"),
        ("a.safetensors?x=.safetensors", "no file of the repository"),
        ("%2e%2e/a.safetensors", "no file of the repository"),
        ("", "no file of the repository"),
        (7, "no file of the repository"),
        (None, "no file of the repository"),
        ("pytorch_model.bin", "reads .safetensors files only"),
        ("absent.safetensors", "is missing, but the index names it"),
    ],
)
def test_hostile_shard_names(tmp_path, file, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")  # outside
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointMismatchError, match=message):
        open_shards(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "JSON list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"x": "one.safetensors"}}', "says that one.safetensors holds 'x'"),
    ],
)
def test_hostile_indices(tmp_path, index, message):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointMismatchError, match=message):
        open_shards(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    weight_map = sharded(tmp_path)
    save_file({"a.weight": torch.ones(2), "d": torch.ones(1)}, tmp_path / "three.safetensors")
    weight_map["d"] = "three.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointMismatchError, match=r"'a.weight' is both in one\.safetensors and in three"):
        open_shards(tmp_path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_headers_whose_length_begins_like_a_pickle(tmp_path, length):
    """896 is 80 03 in hexadecimal, as pickles of protocol 3 begin."""
    padding = 8
    while True:
        save_file({"a": TENSORS["a.weight"]}, tmp_path / "model.safetensors", metadata={"x": "y" * padding})
        found = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
        if found == length:
            break
        padding += length - found
    with open_shards(tmp_path) as shards:
        assert torch.equal(shards.rows("a"), TENSORS["a.weight"])


def test_no_weights_and_pickled_weights(tmp_path):
    with pytest.raises(InvalidInputError, match="has neither"):
        open_shards(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatchError, match="pickle"):
        open_shards(tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be read as a model"):
        open_shards("no/such-model")


def test_offline_a_cache_without_weights_says_where_it_looked(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--half" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match="HF_HUB_OFFLINE is set: only the local cache was looked at"):
        Shards(hub_files.Repository("me/half", "a" * 40))
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointMismatchError, match=r"one.safetensors .* is missing.* HF_HUB_OFFLINE is set"):
        Shards(hub_files.Repository("me/half", "a" * 40))


@given(st.binary(max_size=120), st.integers(0, 200))
def test_any_bytes_are_read_or_refused(text, size):
    good = save(TENSORS)
    for label, content in (("noise", text), ("cut", good[:size]), ("mixed", good[:size] + text + good[size:])):
        try:
            length = header_length(label, content[:LENGTH], len(content))
            places = parse_header(label, content[LENGTH : LENGTH + length], len(content))
        except LOPError:
            continue
        assert all(LENGTH <= place.start <= place.end <= len(content) for place in places.values())


HUB = """
import torch
from hf_lop.hub.read.checkpoint import open_shards
with open_shards("me/model") as shards:
    print(sorted(shards.places), shards.rows("a.weight", 1, 3).tolist(), shards.rows("b.bias").tolist(), shards.files.commit)
"""


@pytest.mark.slow
def test_the_hub_is_asked_for_single_ranges(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(folder)
    (folder / "config.json").write_text("{}")
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    with serve(tmp_path / "hf_home") as hub:
        repository = hub.repositories["me/model"] = Repository()
        commit = repository.commit("main", "weights", files)
        printed = run_python(HUB, hub)
    assert printed == f"{sorted(TENSORS)} [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]] [0.0, 1.0, 2.0, 3.0, 4.0] {commit}\n"
    assert {status for method, path, status in hub.log if method == "GET" and ".safetensors" in path} == {206}
    assert all(commit in path for _, path, _ in hub.log if ".safetensors" in path)


@pytest.mark.slow
def test_after_a_fork_both_processes_read_the_right_rows(tmp_path):
    """Each reads its own rows through the file that both have open."""
    save_file({"a": torch.zeros(400, 16), "b": torch.ones(400, 16)}, tmp_path / "model.safetensors")
    result = subprocess.run([sys.executable, "-c", FORK, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout == "0 wrong\n0 wrong\n"


FORK = """
import os, sys
from hf_lop.hub.read.checkpoint import open_shards
with open_shards(sys.argv[1]) as shards:
    shards.rows("a", 0, 1)
    child = os.fork()
    name, value = ("a", 0) if child else ("b", 1)
    wrong = sum(bool((shards.rows(name, i % 300, i % 300 + 50) != value).any()) for i in range(20_000))
    if child:
        os.waitpid(child, 0)
    print(wrong, "wrong", flush=True)
"""
