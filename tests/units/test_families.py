"""Pruning and reloading over model families: eleven with images, and every type that transformers has."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock

from hf_lop.hub.save.extras import auto_map
from hf_lop.units.ship import remote_code
from tests.families import MULTIMODAL, TEXT, build, text_inputs
from tests.heads import check_heads
from tests.support_table import render, section, short_reason
from tests.tiny_models import CONFIGS, tiny_inputs, tiny_model
from tests.walk import Outcome, check, loaders, logits, uniform, walk

REASONS = {
    "is a mixture of experts",
    "has no gated or plain FFN",
    "has per-neuron parameters inside its FFN",
    "keeps only the neurons that stand out from the mean of all",
}
GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "supported-models.md"


@pytest.mark.parametrize("name", CONFIGS)
def test_family_with_image(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    check(model, inputs, logits(model, inputs))


@pytest.mark.parametrize("model_type", ["idefics2", "udop", "lfm2", "bert", "gpt2"])
def test_no_layer_stays_dense(model_type):
    """Parts beside the decoder may be sized by the text config's width, which no layer has any more."""
    model = build(model_type)
    inputs = text_inputs(model)
    check(model, inputs, logits(model, inputs), lambda dense: [40, 17, 8, 63][: len(dense)])


def test_all_widths_equal_to_the_hidden_size():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    check(model, inputs, logits(model, inputs), lambda dense: [64] * len(dense))


@pytest.fixture(scope="session")
def walked(tmp_path_factory):
    """The folder of what the walks of this test run leave, for all of its processes."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "walked"


# Types whose class builds other shapes from one width, so that a list says what each layer has.
LISTED = sorted(
    [
        "idefics",
        "idefics2",
        "pi0",
        "udop",
        "bloom",
        "blt",
        "gpt_neox_japanese",
        "moshi",
        "mpt",
        "openai-gpt",
        "recurrent_gemma",
        "xlm",
        "xlstm",
    ]
)


@pytest.fixture(scope="session")
def outcome(walked):
    """A model type's outcome. Whichever process asks first walks it and keeps the pruned model with its remote code."""

    def of(model_type):
        folder = walked / model_type.replace("-", "_")
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "outcome.json"
        with FileLock(folder / "lock"):
            if not written.exists():
                found = walk(model_type, lambda *pruned: save_with_code(model_type, *pruned, folder))
                written.write_text(json.dumps(dataclasses.asdict(found)))
        return Outcome(**json.loads(written.read_text()))

    return of


def save_with_code(model_type, model, inputs, folder):
    """Save a pruned model with its remote code, and what a load must give; without an auto class there is no such load."""
    autos = [loader.__name__ for loader in loaders(model)[1:]]
    if autos:
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = auto_map(config["model_type"], type(model.config).__name__)
        (folder / "config.json").write_text(json.dumps(config))
        for name, code in remote_code().items():
            (folder / name).write_bytes(code)
        torch.save({"auto": autos[0], "inputs": inputs, "logits": logits(model, inputs)}, folder / "expected.pt")
        dense = build(model_type)
        with tempfile.TemporaryDirectory() as dense_folder:
            dense.save_pretrained(dense_folder)
            heads = check_heads(model, dense, inputs, (folder, dense_folder))
        (folder / "heads.json").write_text(json.dumps([dataclasses.asdict(head) for head in heads]))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*MULTIMODAL, *TEXT])
def test_every_type_prunes_or_says_why_not(model_type, outcome):
    found = outcome(model_type)
    assert found.group in ("prunes", "refused", "unbuildable"), found.reason
    if found.group == "refused":
        assert short_reason(found).removeprefix("a decoder layer ") in REASONS


@pytest.mark.slow
def test_enough_types_prune(outcome):
    assert sum(outcome(name).group == "prunes" for name in MULTIMODAL) >= 70
    assert sum(outcome(name).group == "prunes" for name in TEXT) >= 100


@pytest.mark.slow
def test_the_guide_lists_what_the_walk_found(outcome):
    pytest.importorskip("timm")
    pytest.importorskip("scipy")
    table = section(GUIDE.read_text(encoding="utf-8"))
    assert table is not None
    written = re.search(r"transformers ([\d.]+)", table)
    if written and written[1] != transformers.__version__:
        pytest.skip(f"the section was written with transformers {written[1]}")
    assert table == render([outcome(name) for name in [*MULTIMODAL, *TEXT]])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*MULTIMODAL, *TEXT])
def test_every_class_of_the_auto_map_loads(model_type, outcome, walked):
    """As the stock class loads the dense model, where that can be done at all."""
    if outcome(model_type).group != "prunes":
        pytest.skip("is not pruned")
    found = heads_of(walked, model_type)
    assert not [head for head in found if head["fault"]]
    assert len([head for head in found if head["skipped"]]) <= 2


@pytest.mark.slow
def test_most_classes_are_compared(outcome, walked):
    found = [head for name in [*MULTIMODAL, *TEXT] if outcome(name) for head in heads_of(walked, name)]
    assert sum(len(head["autos"]) for head in found) > 700
    assert sum(bool(head["skipped"]) for head in found) <= 10
    assert sum(head["compared"] for head in found) >= 500


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*MULTIMODAL, *TEXT])
def test_equal_widths_are_stock_where_the_class_builds_them(model_type, outcome, walked):
    if outcome(model_type).group != "prunes":
        pytest.skip("is not pruned")
    (walked / model_type.replace("-", "_") / "uniform").write_text(uniform(model_type))


@pytest.mark.slow
def test_most_types_with_equal_widths_are_stock(outcome, walked):
    pruned = [name for name in [*MULTIMODAL, *TEXT] if outcome(name).group == "prunes"]
    files = {name: walked / name.replace("-", "_") / "uniform" for name in pruned}
    forms = {name: file.read_text() if file.exists() else uniform(name) for name, file in files.items()}
    assert sorted(name for name, form in forms.items() if form == "list") == LISTED


def heads_of(walked, model_type):
    file = walked / model_type.replace("-", "_") / "heads.json"
    return json.loads(file.read_text()) if file.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_type_loads_with_remote_code_alone(outcome, walked, tmp_path):
    for model_type in [*MULTIMODAL, *TEXT]:
        outcome(model_type)
    script = Path(__file__).parents[1] / "remote_loading.py"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, str(script), str(walked)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert len(list(walked.glob("*/expected.pt"))) > 150
    assert json.loads(run.stdout.splitlines()[-1]) == {}
