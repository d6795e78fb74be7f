"""Shared fixtures: models and pruners made once, copied for every test that changes them; blank pictures, short training."""

import copy
import os
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # scripts there import their neighbours
sys.path.append(f"{sys.path[0]}/benchmarks")

import pytest
from PIL import Image

# Torch and transformers are imported in fixtures and hooks: pytest-xdist's own process, which runs no test, reads this too.


def pytest_collection():
    """Before tests are read, in the processes that run them."""
    import torch
    from hypothesis import settings

    settings.register_profile("suite", deadline=None, derandomize=True)  # a busy machine must not fail a property
    settings.load_profile("suite")
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def pytest_collection_modifyitems(items):
    """The longest first, which have time limits of their own: at the end one process would wait for them."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def slow(*values):
    """Parameters of a test whose fast cases show the same."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


KINDS = ["gated", "conv1d", *slow("gated_bias", "fused", "plain_bias")]  # of FFNs: one of each orientation is fast


@pytest.fixture(scope="session")
def built():
    from tests.small_models import CONFIGS, build

    return {kind: build(kind) for kind in CONFIGS}


@pytest.fixture
def llama(built):
    return copy.deepcopy(built["gated"])


@pytest.fixture
def batches():
    from tests.small_models import text_batches

    return text_batches(3)


@pytest.fixture(scope="session")
def pruner(built):
    from hf_lop.pruner.pruner import LOPPruner
    from tests.small_models import text_batches

    return LOPPruner.fit(
        built["gated"],
        text_batches(2),
        text_batches(1, seed=1),
        predictor="mlp",
        base_model="org/base",
        provenance={"samples": 4},
    )


@pytest.fixture(scope="session")
def _saved(pruner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pruner"
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_pruner(_saved, tmp_path):
    """A folder of one's own with the pruner, which draws its plots only once."""
    return Path(shutil.copytree(_saved, tmp_path / "pruner"))


class Blank:
    """Stands for a figure where nobody looks at it: drawing takes longer than most of a test."""

    def savefig(self, file, **_):
        Image.new("L", (1, 1)).save(file, format="png")


PLOTS = ("plot_widths", "plot_plans", "plot_estimate")


@pytest.fixture(scope="session", autouse=True)
def _blank_plots():
    """What is saved has blank pictures, but for tests with the fixture `plots` and fixtures that use `drawing`."""
    from hf_lop.hub.save import extras

    with pytest.MonkeyPatch.context() as patch:
        for name in PLOTS:
            patch.setattr(extras, name, lambda *_, **__: Blank())
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_training():
    """A fit trains its predictor for 6 epochs: tests of the predictor train it themselves, those in a new process fully."""
    from hf_lop.pruner import fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train_predictor", partial(fit.train_predictor, epochs=6))
        yield


@pytest.fixture
def full_training(monkeypatch):
    """For tests that compare a fit with one of another process."""
    from hf_lop.learning.predictors import train_predictor
    from hf_lop.pruner import fit

    monkeypatch.setattr(fit, "train_predictor", train_predictor)


@contextmanager
def drawing():
    """Within it, what is saved has its real pictures."""
    from hf_lop.hub.save import extras
    from hf_lop.planning import plots

    with pytest.MonkeyPatch.context() as patch:
        for name in PLOTS:
            patch.setattr(extras, name, getattr(plots, name))
        yield


@pytest.fixture
def plots():
    """For tests that look at the pictures of what they save."""
    with drawing():
        yield
