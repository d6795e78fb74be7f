"""Damage to the config.json of pruned models, read by hf_lop and by plain transformers that hf_lop taught."""

import contextlib
import copy
import json
import random
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import hf_lop
from hf_lop.hub.read import load
from tests.fuzz.mutate import json_or_bytes
from tests.fuzz.target import Target, Wrong
from tests.fuzz.world import WIDTHS, World, config_of, linked, logits

KINDS = ("gated", "conv1d", "llava")
OWN = (
    "unpruned_intermediate_size",
    "pruned_units",
    "pruning_config",
    "auto_map",
    "pruned_ffn_output_bias",
    "per_layer_config",
)
HEAVY = (
    *OWN,
    "intermediate_size",
    "n_inner",
    "text_config",
    "num_hidden_layers",
    "n_layer",
    "architectures",
    "model_type",
)
MARK = {"unit": "neurons", "per": 1, "unpruned": 48}
EXTRA: dict[str, list[Any]] = {
    "pruned_units": [
        *(
            {field: MARK}
            for field in ("intermediate_size", "n_inner", "num_attention_heads", "hidden_act", "x", "vocab_size")
        ),
        {"intermediate_size": {**MARK, "unit": "experts"}},
        {"intermediate_size": {**MARK, "per": 2}},
        {"intermediate_size": {**MARK, "per": 0}},
        {"intermediate_size": {**MARK, "unpruned": 7}},
    ],
    "unpruned_intermediate_size": [47, 49, 1, 2**20, [48, 48, 48, 48]],
    "per_layer_config": [{"0": {"intermediate_size": 40}}, {"9": {"intermediate_size": 8}}, {"0": {"hidden_size": 8}}],
    "pruned_ffn_output_bias": [True, 1],
    "intermediate_size": [WIDTHS, WIDTHS[:2], WIDTHS * 2, [48] * 4, [1, 1, 1, 1], 48],
    "num_hidden_layers": [1, 2, 3, 5, 8, 10**6],
    "elastic_config": [{"order": "x"}, {}],
    "architectures": [
        ["LlamaModel"],
        ["LlamaForSequenceClassification"],
        ["GPT2LMHeadModel"],
        ["PreTrainedModel"],
        ["os"],
        [],
    ],
    "auto_map": [{"AutoConfig": "modeling_lop.GPT2Config"}, {"AutoModelForCausalLM": "x.y"}, {}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "x"}, {}],
}


def make(kind: str, world: World, rng: random.Random) -> bytes:
    return json_or_bytes(rng, config_of(world.pruned(kind).folder), HEAVY, EXTRA)


def run(kind: str, read: Callable[[Path], PreTrainedModel], world: World, damage: bytes, folder: Path) -> None:
    pruned = world.pruned(kind)
    with watched() as infos:
        model = read(linked(pruned.folder, folder / "mutated", config_json=damage))
    if incomplete(infos[-1]):
        raise Wrong(f"keys {infos[-1]}")
    compare(kind, world, damage, folder, model, infos[-1])


def compare(
    kind: str, world: World, damage: bytes, folder: Path, model: PreTrainedModel, said: dict[str, Any]
) -> None:
    """Refuse a model that is neither the undamaged one nor what transformers itself makes of such a config.

    Transformers may have said that keys are missing or left over, if it says so of a dense model as well: it warns of that.
    """
    pruned = world.pruned(kind)
    found = _logits(model, pruned.inputs)
    if isinstance(found, str) or not torch.equal(found, pruned.logits):
        stock, told = as_stock(kind, world, damage, folder / "stock")
        if incomplete(told) != incomplete(said):
            raise Wrong(f"transformers says {incomplete(said)}, and {incomplete(told)} of a dense model")
        if isinstance(found, str) or isinstance(stock, str):
            if found != stock:
                raise Wrong(f"a run gives {found}, of a dense model {stock}")
        elif incomplete(told) & {"missing", "mismatched"}:
            pass  # what is missing is random
        elif not torch.allclose(
            found, stock, rtol=1e-3, atol=1e-3 * max(1.0, stock.abs().max().item()), equal_nan=True
        ):
            raise Wrong(f"logits differ by {(found - stock).abs().max()} from a dense model with zeros")
    untouched(kind, world, damage)


def as_stock(kind: str, world: World, damage: bytes, folder: Path) -> tuple[torch.Tensor | str, dict[str, Any]]:
    """What a mutation means to transformers itself: logits of a dense model whose neurons are zeros where they were cut."""
    pruned = world.pruned(kind)
    config, dense = json.loads(damage), config_of(pruned.masked)
    parts = [(config, dense)]
    if isinstance(config.get("text_config"), dict):
        parts.append((config["text_config"], dense["text_config"]))
    for part, original in parts:
        for key in OWN:
            part.pop(key, None)
        for key in ("intermediate_size", "n_inner"):
            part.pop(key, None)
            if key in original:
                part[key] = original[key]
    linked(pruned.masked, folder, config_json=json.dumps(config).encode())
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    except Exception as error:
        raise Wrong(f"read without a word; a dense model is not: {type(error).__name__} {str(error)[:100]}") from error
    return _logits(model, pruned.inputs), info


def incomplete(info: dict[str, Any]) -> set[str]:
    """The kinds of keys that transformers warns of."""
    return {kind for kind in ("missing", "unexpected", "mismatched") if info[f"{kind}_keys"]}


def untouched(kind: str, world: World, damage: bytes) -> None:
    """Refuse a process in which the undamaged model loads no more as it did; looked at now and then."""
    if crc32(damage) % 8:
        return
    pruned = world.pruned(kind)
    found = _logits(load.load_model(pruned.folder), pruned.inputs)
    if isinstance(found, str) or not torch.equal(found, pruned.logits):
        raise Wrong("afterwards the undamaged model is another")


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor | str:
    """Logits, or the kind of error that running the model gives: a config may be right for the weights and not for a batch."""
    floats = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in copy.deepcopy(inputs).items()
    }
    try:
        return logits(model.eval(), floats).float()
    except Exception as error:
        return type(error).__name__


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    """Within it, what transformers says of the keys is kept."""
    found: list[dict[str, Any]] = []
    check = load.check_loaded

    def kept(name: str, info: dict[str, Any], **options: Any) -> None:
        found.append(info)
        check(name, info, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "check_loaded", kept)
        yield found


def plain(kind: str, world: World, damage: bytes, folder: Path) -> None:
    """The same through transformers' own loader."""
    pruned = world.pruned(kind)
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        linked(pruned.folder, folder / "mutated", config_json=damage),
        output_loading_info=True,
        trust_remote_code=False,
    )
    compare(kind, world, damage, folder, model, info)


def theirs(error: Exception) -> bool:
    """Whether the last of both libraries that an error went through is not hf_lop."""
    own = str(Path(hf_lop.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(own):
            return False
        if "/transformers/" in frame.filename:
            return True
    return False


TARGETS = [
    *(Target(f"config-{kind}", partial(make, kind), partial(run, kind, load.load_model)) for kind in KINDS),
    *(Target(f"config-{kind}-plain", partial(make, kind), partial(plain, kind), theirs) for kind in KINDS),
]
