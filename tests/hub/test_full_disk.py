"""A disk that fills up, a real one in memory: one sentence, nothing left, and the same again finishes once there is room."""

import copy
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lop.errors import LOPError
from hf_lop.hub.export.export import export
from hf_lop.planning.budget import Budget
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.pruner.sizes import pull
from tests.conftest import slow
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import text_batches


def mount(folder, size, *more):
    options = ["-o", f"{'remount,' if more else ''}size={size}"]
    return subprocess.run(
        ["mount", *options, "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, and what changes its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or mount(folder, 4096):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder, lambda size: mount(folder, size, "remount")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what was read may still be mapped


def saved_model(built, _other, out):
    model = copy.deepcopy(built)
    fake_pruner(model).prune(model, 0.4, recover=None).save_pretrained(out)


def streamed(built, other, out):
    fake_pruner(built).prune(other / "base", 0.4, recover=None, output_dir=out)


def saved_pruner(built, _other, out):
    fake_pruner(built).save_pretrained(out)


def elastic(built, _other, out):
    model = copy.deepcopy(built)
    fake_pruner(model).make_elastic(model).save_pretrained(out)


def pulled(_built, other, out):
    pull(other / "elastic", out, Budget.of(0.4))


def exported(_built, other, out):
    export(other / "pruned", "uniform", out)


def fitted(built, _other, out):
    LOPPruner.fit(
        copy.deepcopy(built), text_batches(2), text_batches(1, seed=1), predictor="mlp", journal=out.parent / "journal"
    ).save_pretrained(out)


@pytest.mark.parametrize("write", [saved_model, streamed, *slow(saved_pruner, elastic, pulled, exported, fitted)])
def test_at_any_size(built, disk, tmp_path, write):
    folder, resize = disk
    model, other = built["gated"], tmp_path / "other"
    model.save_pretrained(other / "base")
    if write is pulled:
        elastic(model, None, other / "elastic")
    if write is exported:
        saved_model(model, None, other / "pruned")
    write(model, other, tmp_path / "whole" / "out")
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "out").rglob("*")}
    refused = []
    for pages in (1, 2, 4, 8, 16, 24, 32, 48, 64):
        assert not resize(4096 * pages)
        try:
            write(model, other, folder / "out")
        except (LOPError, OSError) as error:
            refused.append(str(error))
            there = (folder / "out").exists()
            assert not there
        else:
            break
    assert refused
    for message in refused:
        assert any(words in message for words in ("is full", "has room for", "No space left")), message
        assert "\n" not in message
    resize("16m")
    if not (folder / "out").exists():
        write(model, other, folder / "out")
    assert {path.relative_to(folder) for path in (folder / "out").rglob("*")} == names
    left = {path.name for path in folder.iterdir()} - {"out", "journal"}
    assert not left
    if write in (saved_model, streamed, pulled):
        first, second = (AutoModelForCausalLM.from_pretrained(root / "out") for root in (folder, tmp_path / "whole"))
        assert torch.equal(logits(first), logits(second))
