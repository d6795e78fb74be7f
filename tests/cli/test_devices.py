"""Where commands compute: on what accelerate finds, or where they are told to."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_lop.cli import app
from hf_lop.errors import InvalidInputError
from hf_lop.pruner.pruner import LOPPruner
from tests.fake_pruner import fake_pruner
from tests.small_models import text_batches


@pytest.fixture(scope="module")
def folders(built, tmp_path_factory):
    root = tmp_path_factory.mktemp("devices")
    built["gated"].save_pretrained(root / "dense")
    fake_pruner(built["gated"]).save_pretrained(root / "pruner")
    return root


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def loads(monkeypatch):
    """What models are loaded with."""
    seen = []
    from hf_lop.hub.read.load import load_model

    def spy(name, **options):
        seen.append(options)
        return load_model(name, **{**options, "device_map": "cpu"})

    for module in ("hf_lop.pruner.prune", "hf_lop.pruner.prepare", "hf_lop.hub.read.load"):
        monkeypatch.setattr(f"{module}.load_model", spy)
    return seen


def test_the_accelerator_is_the_default(folders, loads, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.PartialState", lambda: type("State", (), {"device": torch.device("meta")})())
    run("prune", folders / "dense", "--pruner", folders / "pruner", "--ratio", 0.3, "--out", tmp_path / "a")
    run(
        "prune",
        folders / "dense",
        "--pruner",
        folders / "pruner",
        "--ratio",
        0.3,
        "--out",
        tmp_path / "b",
        "--device",
        "cpu",
    )
    run(
        "make-elastic",
        folders / "dense",
        "--pruner",
        folders / "pruner",
        "--out",
        tmp_path / "c",
        "--dtype",
        "bfloat16",
    )
    assert [(seen["device_map"], seen.get("dtype")) for seen in loads] == [
        ("meta", None),
        ("cpu", None),
        ("meta", torch.bfloat16),
    ]
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda:77"], "--device is 'cuda:77', which is not to be had here"),
        (["--device", "warp"], "--device is 'warp'"),
        (["--dtype", "int8"], "--dtype is 'int8'; it must be a floating-point dtype"),
        (["--dtype", "nonsense"], "--dtype is 'nonsense'"),
        (["--stream", "--device", "cpu"], "--stream copies files as they are"),
    ],
)
def test_what_is_not_to_be_had(folders, tmp_path, words, message):
    with pytest.raises(InvalidInputError, match=message):
        run(
            "prune", folders / "dense", "--pruner", folders / "pruner", "--ratio", 0.3, "--out", tmp_path / "x", *words
        )
    assert not (tmp_path / "x").exists()


def test_in_python(folders, built):
    pruner = LOPPruner.from_pretrained(folders / "pruner")
    pruned = pruner.prune(folders / "dense", 0.3, loading={"dtype": torch.bfloat16, "device_map": "cpu"})
    assert pruned.dtype == torch.bfloat16
    data = text_batches(3)
    made = LOPPruner.fit(
        folders / "dense", data[:2], data[2:], predictor="mlp", sketch_rows=0, loading={"dtype": torch.float64}
    )
    assert made.config.base_dtype == "float64"
    for call in (
        lambda: pruner.prune(built["gated"], 0.3, loading={"dtype": torch.float64}),
        lambda: LOPPruner.fit(built["gated"], data[:2], data[2:], loading={"dtype": torch.float64}),
        lambda: pruner.prune(folders / "dense", 0.3, output_dir="x", loading={"dtype": torch.float64}),
    ):
        with pytest.raises(InvalidInputError, match="loading"):
            call()


def test_latency_says_where_it_was_measured(folders):
    made = json.loads(run("plan", folders / "pruner", "--latency", 1, "--device", "cpu", "--json").stdout)
    assert made["measured_on"] == "cpu"
    assert "ms per token on cpu" in run("plan", folders / "pruner", "--latency", 1).stdout
