"""Ctrl-C between any two lines of what changes a user's model: whole layers, and a config that says what they are."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import hf_lop
from hf_lop.errors import UnsupportedModelError
from hf_lop.pruner.pruner import LOPPruner
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import text_batches

ROOT = str(Path(hf_lop.__file__).parent)
STOPS = 24


class Lines:
    """Counts the lines of hf_lop that are run, and interrupts before the one that is asked for."""

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _enter(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(ROOT) else None

    def _line(self, frame, event, _):
        if event == "line":
            if self.seen == self.at:
                self.seen += 1
                raise KeyboardInterrupt
            self.seen += 1
        return self._line


def prune(model):
    fake_pruner(model).prune(model, 0.4)


def elastic(model):
    fake_pruner(model).make_elastic(model)


def fit(model):
    LOPPruner.fit(model, text_batches(2), text_batches(1, seed=1), predictor="mlp", targets=(0.2, 0.5))


def first_change(model, change):
    """The line before which nothing of the model is changed."""

    class Found(Exception):
        pass

    def found(*_):
        raise Found

    lines = Lines()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hf_lop.pruner.prune.changing", "hf_lop.pruner.serve.changing"):
            patch.setattr(name, found)
        with pytest.raises(Found), lines:
            change(model)
    return lines.seen


def widths_of(model):
    listed = model.config.intermediate_size
    return listed if isinstance(listed, list) else [listed] * 4


def check(model, dense, before, what, tmp_path):
    """A model runs, has the widths that its config lists, and is untouched, finished, or refused; return which."""
    found = logits(model)
    assert widths_of(model) == [layer.mlp.up_proj.out_features for layer in model.model.layers]
    if hasattr(model.config, "lop_unfinished"):
        for use in (lambda: fake_pruner(dense).prune(model, 0.4), lambda: model.save_pretrained(tmp_path / "out")):
            with pytest.raises(UnsupportedModelError, match=f"in the middle of {what}"):
                use()
        assert not (tmp_path / "out").exists()
        if what == "make_elastic":  # whole layers are sorted, which changes nothing
            torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
        return "unfinished"
    if getattr(model.config, "pruning_config", None) or getattr(model.config, "elastic_config", None):
        return "finished"
    assert torch.equal(found, before)
    return "untouched"


@pytest.mark.slow
@pytest.mark.parametrize(("change", "what"), [(prune, "prune"), (elastic, "make_elastic")])
def test_at_any_line(built, tmp_path, change, what):
    dense = built["gated"]
    before, whole = logits(dense), copy.deepcopy(dense)
    change(copy.deepcopy(dense))  # what is made once is made now
    with Lines() as lines:
        change(whole)
    start = first_change(copy.deepcopy(dense), change)
    seen, finished = {}, logits(whole)
    step = max(1, (lines.seen - start) // STOPS)
    for at in [start // 2, *range(start - 2, lines.seen, step), *range(lines.seen - 6, lines.seen)]:
        model = copy.deepcopy(dense)
        with pytest.raises(KeyboardInterrupt), Lines(at):
            change(model)
        state = check(model, dense, before, what, tmp_path)
        if state == "finished":
            assert torch.equal(logits(model), finished)
            assert widths_of(model) == widths_of(whole)
        seen.setdefault(state, []).append(at)
    assert {"untouched", "unfinished", "finished"} <= seen.keys(), seen
    assert len(seen["unfinished"]) >= STOPS // 3


@pytest.mark.slow
def test_a_fit_only_reads(built):
    dense, model = built["gated"], copy.deepcopy(built["gated"])
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with Lines() as lines:
        fit(copy.deepcopy(dense))
    for at in range(5, lines.seen, lines.seen // 8):
        with pytest.raises(KeyboardInterrupt), Lines(at):
            fit(model)
        assert model.config.to_dict() == dense.config.to_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(logits(model), logits(dense))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
