import ast
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_lop import __version__
from hf_lop.errors import InvalidInputError
from hf_lop.hub.cards.elastic import elastic_card
from hf_lop.hub.cards.facts import MARKER
from hf_lop.hub.cards.pruned import pruned_model_card
from hf_lop.hub.cards.pruner import pruner_card
from hf_lop.hub.save.extras import auto_map, save_pruner_extras
from hf_lop.hub.write.companions import base_metadata, copy_companions
from hf_lop.hub.write.push import open_repository
from hf_lop.learning.config import LOPConfig
from hf_lop.planning.plots import plot_estimate, plot_plans, plot_widths
from hf_lop.recovery.choose import RECOVERIES
from tests.conftest import slow

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE = [1000] * 6
CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "auto_map": auto_map("qwen2_5_vl", "Qwen2_5_VLConfig"),
    "pruning_config": {
        "method": "lop",
        "ratio": 0.3,
        "base_model": "org/base",
        "base_revision": "0123456789abcdef0123456789abcdef01234567",
        "pruner": "org/lop-base",
        "pruner_revision": None,
        "criterion": "l2",
        "round_to": 8,
        "dense_widths": DENSE,
        "dense_parameters": 2_000_000,
        "dense_bytes": 4_000_000,
        "dense_flops": 3_000_000,
        "flops": 2_308_800,
        "estimated_divergence": 0.03125,
        "calibration": {"dataset": "org/data", "samples": 400, "seed": 0},
        "hf_lop_version": __version__,
    },
}
PRUNED = {"widths": [900, 400, 700, 700, 500, 1000], "parameters": 1_654_400, "num_bytes": 3_308_800}
LOP = {
    "base_model": "org/base",
    "base_revision": "0123456789abcdef0123456789abcdef01234567",
    "base_model_type": "qwen2_5_vl",
    "base_size": {
        "widths": DENSE,
        "hidden_size": 64,
        "projections": 3,
        "parameters": 2_000_000,
        "num_bytes": 4_000_000,
        "flops": 3_000_000,
        "neuron_parameters": [192] * 6,
        "neuron_bytes": [384] * 6,
    },
    "calibration": {
        "dataset": "org/data",
        "samples": {"calibration": 400, "search": 300},
        "seed": 0,
        "search": "cmaes",
        "reward": "divergence",
        "evaluations per target": 200,
        "calibration_sha256": "0123456789abcdef",
        "search_sha256": "fedcba9876543210",
        "seconds": {"calibration": 1.5, "probes": 26.1, "cmaes": 300.2, "predictor": 7.9},
        "versions": {"hf_lop": __version__, "torch": "2.14.1", "transformers": "5.23.0"},
    },
    "predictor_loss": 1.25e-4,
    "max_ratio": 0.8,
    "search_table": [{"ratio": 0.5, "ratios": [0.5] * 6, "reward": -0.07}],
    "probes": {
        "ratios": [0.5, 0.95],
        "damage": [[0.01, 0.05]] * 6,
        "context": 0.5,
        "around": [[0.02, 0.06]] * 6,
    },
}
PLANS = {0.2: [900, 700, 800, 700, 700, 1000], 0.3: PRUNED["widths"], 0.5: [700, 200, 400, 500, 300, 900]}


def cards():
    return {
        "pruned_model": pruned_model_card(
            CONFIG,
            name="me/base-lop30",
            processor="AutoProcessor",
            base_data={"license": "mit", "language": ["en"], "datasets": ["x"]},
            tags=["chat"],
            **PRUNED,
        ),
        "pruner": pruner_card(LOPConfig(**LOP), PLANS, name="org/lop-base"),
    }


@pytest.mark.parametrize("name", ["pruned_model", "pruner"])
def test_card_is_the_golden_one(name):
    """Write the golden cards anew with UPDATE_GOLDEN=1."""
    path, card = GOLDEN / f"{name}.md", str(cards()[name]).replace(__version__, "VERSION")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(card, encoding="utf-8")
    assert card == path.read_text(encoding="utf-8")


def test_the_card_says_which_quantisers_the_widths_suit():
    odd, even = (str(pruned_model_card(CONFIG, name="x", **PRUNED | {"widths": [width] * 6})) for width in (700, 768))
    assert "All widths are multiples of 700. Quantisers that work in groups of 32 to 128 weights" in odd
    assert "prune with round_to=128 or round_to=256 for them" in odd
    assert "All widths are multiples of 768, so they suit quantisers that work in groups" in even


@pytest.mark.parametrize("name", ["pruned_model", "pruner"])
def test_metadata_is_plain_yaml(name):
    text = str(cards()[name])
    metadata = yaml.safe_load(text.split("---")[1])  # safe_load refuses Python objects
    assert metadata["base_model"] == "org/base"
    assert "lop" in metadata["tags"]
    assert "None" not in text
    assert "{{" not in text.split("```bibtex")[0]
    assert ModelCard(text).data.to_dict() == metadata


def test_the_hub_shows_a_family():
    found = {name: card.data.to_dict() for name, card in cards().items()}
    assert {name: data["base_model_relation"] for name, data in found.items()} == {
        "pruned_model": "finetune",
        "pruner": "adapter",
    }
    assert found["pruner"]["datasets"] == ["org/data"]
    orphan = pruner_card(LOPConfig(**LOP | {"base_model": None}), PLANS, name="me/p").data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(orphan)


def test_estimates_need_probes():
    without = pruner_card(LOPConfig(**LOP | {"probes": None}), PLANS, name="me/p")
    assert "stimated" not in str(without)
    assert "quality.png" not in str(without)
    old = {key: value for key, value in CONFIG["pruning_config"].items() if "flops" not in key and "estim" not in key}
    old = str(pruned_model_card(CONFIG | {"pruning_config": old}, name="me/x", **PRUNED))
    assert "stimated" not in old
    assert "FLOPs" not in old


def test_estimates_say_whether_candidates_were_recovered():
    made = CONFIG["pruning_config"] | {"recovery": "sketch"}
    assert "base model, before recovery:" in str(
        pruned_model_card(CONFIG | {"pruning_config": made}, name="x", **PRUNED)
    )
    made["calibration"] = {"recovery": "sketch"}
    card = str(pruned_model_card(CONFIG | {"pruning_config": made}, name="x", **PRUNED))
    assert "base model, after recovery from the sketch:" in card
    card = str(pruner_card(LOPConfig(**LOP | {"calibration": {"recovery": "sketch"}}), PLANS, name="org/p"))
    assert "per prediction, after recovery from the sketch. It" in card


@pytest.mark.parametrize("recovery", [*RECOVERIES, "bias"])  # the last was saved by versions before
def test_every_recovery_has_its_words(recovery):
    made = CONFIG["pruning_config"] | {"recovery": recovery}
    card = str(pruned_model_card(CONFIG | {"pruning_config": made}, name="x", **PRUNED))
    words = {"lstsq": "did, by least squares on calibration data", "sketch": "least squares on the pruner's sketch"}
    words |= {"sequential": "layer after layer by least squares", "fold": "as far as their mean", "bias": "got a bias"}
    assert [name for name, text in words.items() if text in card] == [recovery]
    assert f"(`{recovery}`)" in card


def test_the_elastic_card_says_what_the_pruner_card_says():
    mark = {"base_model": "org/base", "base_revision": LOP["base_revision"], "pruner": "org/lop-base"}
    config = {"architectures": CONFIG["architectures"], "elastic_config": mark}
    how = {"name": "me/elastic", "auto_maps": CONFIG["auto_map"], "extra_bytes": 680_000}
    card = str(elastic_card(config, LOPConfig(**LOP), PLANS, **how))
    golden = str(cards()["pruner"])
    rows = [line for line in golden.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert set(rows) <= set(card.splitlines())
    assert "assets/quality.png" in card
    assert "per prediction, before recovery. It" in card
    assert "elastic.materialize().save_pretrained(" in card
    assert "680.00 kB, 17% of the dense weights" in card
    without = str(elastic_card(config, LOPConfig(**LOP | {"probes": None}), PLANS, **how))
    assert "stimated" not in without
    assert "quality.png" not in without
    assert "None" not in card + without


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_plots_of_quality(tmp_path):
    curve, config = {0.0: 0.0, 0.4: 0.02, 0.8: 0.2}, LOPConfig(**LOP)
    (one,) = plot_estimate(curve, {0.5: -0.07}, "divergence", tmp_path / "q.png").axes
    assert [line.get_ydata()[0] for line in one.lines] == [0.0, 0.07]
    upper, lower = plot_estimate(curve, {0.5: 0.9}, "accuracy").axes
    assert (len(upper.lines), lower.lines[0].get_ydata()[0]) == (1, 0.9)
    assert len(plot_estimate(curve, {}, None).axes) == 1
    save_pruner_extras(config, lambda ratio: [round(1000 * (1 - ratio))] * 6, tmp_path, "org/p")
    assert (tmp_path / "assets" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_pruned_card_takes_the_license_of_the_base_model():
    data = cards()["pruned_model"].data.to_dict()
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "datasets" not in data
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["lop", "pruned", "chat"]


@pytest.mark.parametrize(("name", "first", "count"), [("pruned_model", 600, 3), ("pruner", 200, 2)])
def test_code_blocks_are_near_the_top_and_compile(name, first, count):
    body = cards()[name].text.strip()
    assert body.index("```python") < first
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        compile(block, name, "exec")


def test_unknown_facts_are_left_out():
    config = CONFIG | {"auto_map": auto_map("qwen2", "Qwen2Config"), "architectures": ["Qwen2ForCausalLM"]}
    config["pruning_config"] = config["pruning_config"] | dict.fromkeys(("base_model", "base_revision", "pruner"))
    text = str(pruned_model_card(config, name="./out", **PRUNED))
    assert "on no Hub repository" in text
    assert 'AutoModelForCausalLM.from_pretrained("./out")' in text
    assert "None" not in text
    assert "Processor" not in text
    text = str(
        pruner_card(
            LOPConfig(**LOP | {"base_model": None, "calibration": None, "predictor_loss": None}), {}, name="./p"
        )
    )
    assert "None" not in text
    assert "not recorded" in text


def test_another_dtype_is_not_sold_as_pruning():
    text = str(pruned_model_card(CONFIG, name="me/x", **PRUNED | {"num_bytes": 1_654_400}))
    assert "2 bytes per parameter before, 1 after" in text
    assert "bytes per parameter" not in str(cards()["pruned_model"])


def test_hostile_names_stay_data():
    name = 'me/x"); import os; ("'
    blocks = re.findall(r"```python\n(.*?)```", str(pruned_model_card(CONFIG, name=name, **PRUNED)), re.DOTALL)
    imported = {
        alias.name for block in blocks for node in ast.walk(ast.parse(block)) for alias in getattr(node, "names", ())
    }
    assert imported == {"hf_lop", "AutoModelForImageTextToText"}
    calibration = {"dataset": "a|b\n\n# Title <script>"}
    card = str(pruner_card(LOPConfig(**LOP | {"calibration": calibration}), PLANS, name="org/p"))
    assert "| dataset | a\\|b # Title &lt;script> |" in card


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_a_card_of_ones_own_is_kept(tmp_path):
    config, plan = LOPConfig(**LOP), lambda ratio: [round(1000 * (1 - ratio))] * 6
    save_pruner_extras(config, plan, tmp_path, "org/first")
    save_pruner_extras(config, plan, tmp_path, "org/second")
    assert "org/second" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "assets" / "plans.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace(MARKER, ""))
    save_pruner_extras(config, plan, tmp_path, "org/third")
    assert "org/second" in (tmp_path / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "assets"]  # and no temporary file


def test_a_hub_that_does_not_answer_is_not_one_without_a_card(monkeypatch):
    def silent(*_, **__):
        raise LocalEntryNotFoundError("timeout")

    monkeypatch.setattr("hf_lop.hub.write.push.HfApi.create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr("hf_lop.hub.write.push.HfApi.hf_hub_download", silent)
    with pytest.raises(InvalidInputError, match="did not answer"):
        open_repository("me/x", private=None, token=None, revision=None, create_pr=False)


def test_companions_are_copied_by_name_and_never_over_a_file(tmp_path):
    source, destination = tmp_path / "base", tmp_path / "out"
    for path in (source / "tokenizer", destination):
        path.mkdir(parents=True)
    wanted = [
        "tokenizer.json",
        "merges.txt",
        "preprocessor_config.json",
        "chat_template.jinja",
        "LICENSE",
        "qwen.tiktoken",
    ]
    unwanted = [
        "model.safetensors",
        "processing_x.py",
        "tokenizer.pkl",
        "config.json",
        "training_args.bin",
        "tokenizer/vocab.txt",
    ]
    for name in (*wanted, *unwanted):
        (source / name).write_text("base")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    (destination / "merges.txt").write_text("own")
    assert copy_companions(source, None, destination) == {"license": "mit"}
    assert sorted(p.name for p in destination.iterdir()) == sorted(wanted)
    assert (destination / "merges.txt").read_text() == "own"


@pytest.mark.parametrize("source", ["nobody/nothing", "not a repository id!"])
def test_a_base_model_out_of_reach_is_a_warning(tmp_path, source):
    with pytest.warns(UserWarning, match="Save them yourself"):
        assert copy_companions(source, None, tmp_path) == {}
    assert not list(tmp_path.iterdir())
    assert base_metadata(source, None) == {}


@pytest.mark.parametrize("layers", [1, 8, *slow(80)])
def test_plots_show_every_layer_and_leave_pyplot_alone(tmp_path, layers):
    loaded = "matplotlib.pyplot" in sys.modules
    figure = plot_widths([i * 10 + 1 for i in range(layers)], [1000] * layers, tmp_path / "w.png", title="Title")
    (axis,) = figure.axes
    assert axis.get_title(loc="left") == "Title"
    assert len(axis.texts) == layers
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    assert len(plot_plans({0.2: [8] * layers, 0.5: [5] * layers}, [10] * layers).axes) == 2
    assert loaded or "matplotlib.pyplot" not in sys.modules


def test_auto_map_covers_every_auto_class():
    assert auto_map("qwen2_5_vl", "Qwen2_5_VLConfig") == {
        "AutoConfig": "modeling_lop.Qwen2_5_VLConfig",
        "AutoModel": "modeling_lop.Qwen2_5_VLModel",
        "AutoModelForImageTextToText": "modeling_lop.Qwen2_5_VLForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_lop.Qwen2_5_VLForConditionalGeneration",
    }
    llama = auto_map("llama", "LlamaConfig")
    assert llama["AutoModelForCausalLM"] == "modeling_lop.LlamaForCausalLM"
    assert llama["AutoModelForSequenceClassification"] == "modeling_lop.LlamaForSequenceClassification"


def test_card_loads_the_class_that_was_saved():
    config = CONFIG | {
        "auto_map": auto_map("llama", "LlamaConfig"),
        "architectures": ["LlamaForSequenceClassification"],
    }
    card = pruned_model_card(config, name="me/x", **PRUNED)
    assert 'AutoModelForSequenceClassification.from_pretrained("me/x")' in str(card)
    assert card.data.pipeline_tag is None


@pytest.mark.parametrize(
    "card",
    [
        b"---\nfoo: [\n---\n",
        b"---\n- a\n---\n",
        b"# no metadata\n",
        b"\xff\xfe",
        b"---\ntags: 5\n---\n",
        b"---\non: 1\n---\n",
        b"---\na: " + b"[" * 1000 + b"\n---\n",
    ],
)
def test_a_broken_card_of_the_base_model_is_passed_over(tmp_path, card):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_bytes(card)
    assert copy_companions(tmp_path / "base", None, tmp_path) == {}


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    """A cloned repository could otherwise have any file of this machine pushed; the Hub's cache links to its blobs."""
    (tmp_path / "secret").write_text("key")
    snapshot, out = tmp_path / "models--me--base" / "snapshots" / "1", tmp_path / "out"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "0a").write_text("{}")
    (snapshot / "preprocessor_config.json").symlink_to("../../blobs/0a")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    out.mkdir()
    copy_companions(snapshot, None, out)
    assert [file.name for file in out.iterdir()] == ["preprocessor_config.json"]
