"""Configs of pruners and models that hold what does not belong there: a sentence, before anything is made of it."""

import copy
import json

import pytest
from transformers import AutoModelForCausalLM

from hf_lop.errors import CheckpointMismatchError
from hf_lop.pruner.pruner import LOPPruner

ODD = (None, "x", -1, 1.5, True, [], {}, [None], [[1]], float("nan"), 10**40)


@pytest.mark.parametrize(
    "key", ["hidden_size", "projections", "parameters", "num_bytes", "flops", "neuron_parameters", "neuron_bytes"]
)
def test_sizes(pruner, key):
    config = copy.deepcopy(pruner.config)
    for value in ODD:
        config.base_size = {**pruner.config.base_size, key: value}
        with pytest.raises(CheckpointMismatchError, match=r"base_size|does not describe"):
            _ = config.size


@pytest.mark.parametrize("key", ["ratios", "damage", "around", "context"])
def test_probes(pruner, key):
    config, widths = copy.deepcopy(pruner.config), list(pruner.config.size.widths)
    for value in ODD:
        config.probes = {**pruner.config.probes, key: value}
        try:
            assert config.estimate(widths) == pytest.approx(0, abs=1e-9)
        except CheckpointMismatchError as error:
            assert "probes of this pruner are damaged" in str(error)  # noqa: PT017


@pytest.mark.parametrize("value", [[], "x", 7, {"damage": 3}])
def test_odd_probes_as_a_whole(saved_pruner, llama, value):
    config = json.loads((saved_pruner / "config.json").read_text())
    (saved_pruner / "config.json").write_text(json.dumps({**config, "probes": value}))
    try:
        LOPPruner.from_pretrained(saved_pruner).prune(llama, 0.3)
    except (CheckpointMismatchError, ValueError) as error:
        assert "probes" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "layers", [{"x": {"intermediate_size": 8}}, {"9": {"intermediate_size": 8}}, {"1.5": {}}, {"-1": {}}]
)
def test_a_per_layer_config_of_no_layers(built, tmp_path, layers):
    built["gated"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in (
        {**config, "per_layer_config": layers},
        {**config, "per_layer_config": {"1": {"intermediate_size": 8}}},
    ):
        if changed["per_layer_config"] is not layers:
            del changed["num_hidden_layers"]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointMismatchError, match="per_layer_config names the layers"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
