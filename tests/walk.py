"""What pruning does to every model type of transformers: prunes and reloads, is refused, or cannot be built here."""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.units.configs import layer_widths, text_configs
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking, slice_units
from tests.families import build, text_inputs

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found for one model type: "prunes", "refused", "unbuildable", or "fails", which is a defect of hf_lop."""

    model_type: str
    group: str
    reason: str = ""


def walk(model_type: str, keep: Callable[[PreTrainedModel, Inputs], None] | None = None) -> Outcome:
    """Build, prune, save and reload one type; a pruned model that passed is shown to `keep` with its inputs."""
    try:
        model = build(model_type)
        inputs = text_inputs(model)
        dense = logits(model, inputs)
    except ImportError as error:
        return Outcome(model_type, "unbuildable", f"needs a package that is not installed: {_line(error)}")
    except Exception as error:  # whatever stops transformers from building it is the finding
        return Outcome(model_type, "unbuildable", _line(error))
    try:
        find_units(model)
    except UnsupportedModelError as error:
        return Outcome(model_type, "refused", str(error))
    try:
        check(model, inputs, dense)
    except Exception as error:
        if not reloads_dense(model_type, inputs):
            return Outcome(model_type, "unbuildable", "transformers does not reload the dense model it saved")
        return Outcome(model_type, "fails", _line(error))
    if keep:
        keep(model, inputs)
    return Outcome(model_type, "prunes")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """Logits; the least number, by which some families rule tokens out, becomes 0."""
    result = model(**copy.deepcopy(inputs)).logits
    if not torch.isfinite(result).all():
        raise ArithmeticError("the logits are not finite")
    return result.masked_fill(result < -1e30, 0)


def irregular(dense: list[int]) -> list[int]:
    """One layer dense, one odd width, one width equal to the hidden size of the tiny models."""
    return [min(width, (width, 40, 17, 64)[layer % 4]) for layer, width in enumerate(dense)]


def check(
    model: PreTrainedModel, inputs: Inputs, dense: torch.Tensor, choose: Callable[[list[int]], list[int]] = irregular
) -> None:
    """Prune, and prove the result: equal to a mask, and bit-equal after every kind of reload."""
    units = find_units(model)
    generator = torch.Generator().manual_seed(2)
    widths = choose([unit.count for unit in units])
    kept = [torch.randperm(f.count, generator=generator)[:w] for f, w in zip(units, widths, strict=True)]
    with masking(model, units, kept):
        masked = logits(model, inputs)
    untouched = copy.deepcopy(model)
    slice_units(untouched, [torch.arange(unit.count) for unit in units])
    assert torch.equal(logits(untouched, inputs), dense), "ratio 0 changed the logits"
    slice_units(model, kept)
    pruned = logits(model, inputs)
    scale = max(1.0, masked.abs().max().item())
    assert (masked - dense).abs().max() > 1e-3 * scale, "the neurons that were cut had no effect"
    assert (masked - pruned).abs().max() <= 1e-5 * scale, f"pruned is not masked: {(masked - pruned).abs().max()}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for loader in loaders(model):
            loaded, info = loader.from_pretrained(folder, output_loading_info=True)
            assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), str(info)
            assert type(loaded) is type(model), f"{loader.__name__} loaded a {type(loaded).__name__}"
            assert torch.equal(logits(loaded.eval(), inputs), pruned), f"{loader.__name__}: logits differ after reload"
            check_config(loaded, widths)
        loaded.save_pretrained(folder)
        check_config(type(model).from_pretrained(folder), widths)


def uniform(model_type: str) -> str:
    """Cut all layers of a type to the same width, and prove its reload; return the form in which it is saved, "stock" or "list"."""
    model = build(model_type)
    inputs, units = text_inputs(model), find_units(model)
    width = max(1, min(unit.count for unit in units) // 2)
    slice_units(model, [torch.arange(width)] * len(units))
    model.config.pruning_config = {"dense_widths": [unit.count for unit in units]}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), str(info)
        assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs)), "logits differ after reload"
        assert [unit.count for unit in find_units(loaded)] == [width] * len(units)
        form = "list" if "auto_map" in config else "stock"
        assert (layer_widths(text_configs(loaded)[0]) is None) == (form == "stock")
        return form


def check_config(model: PreTrainedModel, widths: list[int]) -> None:
    config = text_configs(model)[0]
    assert layer_widths(config) == widths, f"config has {layer_widths(config)} for {widths}"
    assert not config.to_dict().get("per_layer_config"), "list and per_layer_config together"
    assert [unit.count for unit in find_units(model)] == widths


def loaders(model: PreTrainedModel) -> list[type]:
    """The class itself, and the auto classes that give this class for its config."""
    found = [type(model)]
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        mapping, config = auto._model_mapping, type(model.config)
        if config in mapping and mapping[config] is type(model):
            found.append(auto)
    return found


def reloads_dense(model_type: str, inputs: Inputs) -> bool:
    """Whether transformers by itself saves and reloads the dense model of this type bit for bit."""
    model = build(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for loader in loaders(model):
            loaded, info = loader.from_pretrained(folder, output_loading_info=True)
            if info["missing_keys"] or not torch.equal(logits(loaded.eval(), inputs), logits(model, inputs)):
                return False
    return True
