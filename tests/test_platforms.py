"""Windows has no such system calls, and macOS not all of them: everything that writes and reads works without."""

import copy
import errno
import os
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lop import files
from hf_lop.planning.budget import Budget
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.pruner.sizes import pull
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import text_batches


@pytest.fixture
def windows(monkeypatch):
    """What is not there, and what fails there: folders cannot be opened, open files not be renamed."""
    real_open, real_replace = os.open, os.replace

    def open_file(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return real_open(path, *arguments, **options)

    def replace(source, target):
        for handle in os.listdir("/proc/self/fd"):
            try:
                opened = os.readlink(f"/proc/self/fd/{handle}")
            except FileNotFoundError:
                continue
            assert opened != os.path.realpath(source), "an open file is renamed"
        real_replace(source, target)

    for name in ("preadv", "posix_fadvise", "sysconf"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(files, "POSIX", False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # what removes folders there
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.usefixtures("windows")
def test_everything_that_writes_and_reads(built, tmp_path):
    with pytest.raises(ImportError):
        __import__("fcntl")
    dense, pruner = built["gated"], fake_pruner(built["gated"])
    dense.save_pretrained(tmp_path / "dense")
    pruner.save_pretrained(tmp_path / "pruner")
    loaded = LOPPruner.from_pretrained(tmp_path / "pruner")
    model = loaded.prune(copy.deepcopy(dense), 0.3)
    model.save_pretrained(tmp_path / "pruned")
    loaded.prune(tmp_path / "dense", 0.3, output_dir=tmp_path / "streamed")
    loaded.make_elastic(copy.deepcopy(dense)).save_pretrained(tmp_path / "elastic")
    pull(tmp_path / "elastic", tmp_path / "pulled", Budget.of(0.3))
    sized = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", lop_ratio=0.3)
    for folder in ("pruned", "streamed"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pulled")), logits(sized))
    data = text_batches(3)
    fits = [
        LOPPruner.fit(
            dense, data[:2], data[2:], predictor="mlp", search="cmaes", evaluations=2, journal=tmp_path / "kept"
        )
        for _ in range(2)
    ]
    assert fits[0].config.search_table == fits[1].config.search_table
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["dense", "pruner", "pruned", "streamed", "elastic", "pulled", "kept"]
    )
