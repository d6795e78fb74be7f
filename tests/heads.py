"""Every class that the `auto_map` of a pruned checkpoint names, beside the same class as it loads the dense checkpoint."""

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.save.extras import auto_map
from hf_lop.units.configs import layer_lists, text_configs
from hf_lop.units.kinds import find_units
from tests.walk import Inputs, check_config

State = dict[str, torch.Tensor]
Report = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Head:
    """What was found for one class of an auto_map.

    Attributes:
        autos: the Auto classes that give it, the first of which loaded it.
        cls: its name.
        skipped: why transformers itself does not load the dense checkpoint so; then nothing was checked.
        fault: what is wrong.
        compared: whether what its decoder puts out was compared with the pruned model's.
        info: what a load of it reports.
        digest: of its weights that come from the checkpoint.
    """

    autos: list[str]
    cls: str
    skipped: str = ""
    fault: str = ""
    compared: bool = False
    info: Report = field(default_factory=dict)
    digest: str = ""


def check_heads(
    pruned: PreTrainedModel, dense: PreTrainedModel, inputs: Inputs, folders: tuple[Path, Path]
) -> list[Head]:
    """Load every class of the auto_map from the folders of the pruned model and of the dense one, and compare.

    Args:
        pruned (`PreTrainedModel`): the pruned model.
        dense (`PreTrainedModel`): what it was.
        inputs (`Inputs`): for their forward passes.
        folders (`tuple[Path, Path]`): where both are saved.
    """
    named = auto_map(pruned.config.model_type, type(pruned.config).__name__)
    autos: dict[str, list[str]] = {}
    for auto, cls in named.items():
        if auto != "AutoConfig":
            autos.setdefault(cls.removeprefix("modeling_lop."), []).append(auto)
    pair = _Pair(pruned, dense, inputs)
    return [_check(names, cls, pair, folders) for cls, names in autos.items()]


class _Pair:
    """The pruned model and the dense one: a tensor of a head is known by its value in the latter, whatever its name."""

    def __init__(self, pruned: PreTrainedModel, dense: PreTrainedModel, inputs: Inputs) -> None:
        self.inputs, self.widths = inputs, [unit.count for unit in find_units(pruned)]
        self.outputs = tuple(layer_outputs(model, inputs) for model in (pruned, dense))
        self.pruned, self.names = pruned.state_dict(), {}
        for name, tensor in dense.state_dict().items():
            self.names.setdefault(_bytes(tensor), []).append(name)

    def expected(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What may stand in the place of a tensor of the dense head: what is no part of the model is as it was."""
        return [self.pruned[name] for name in self.names.get(_bytes(tensor), ())] or [tensor]


def _check(autos: list[str], cls: str, pair: _Pair, folders: tuple[Path, Path]) -> Head:
    load = getattr(transformers, autos[0]).from_pretrained
    try:
        dense, dense_info = load(folders[1], output_loading_info=True)
    except Exception as error:  # whatever stops transformers from loading it is the finding
        return Head(autos, cls, skipped=f"{type(error).__name__}: {error}"[:160])
    try:
        head, info = load(folders[0], output_loading_info=True)
        assert type(head).__name__ == cls, f"is a {type(head).__name__}"
        assert report(info) == report(dense_info), f"reports {report(info)}, dense {report(dense_info)}"
        _check_weights(head, dense, pair, info["missing_keys"])
        compared = _check_output(head.eval(), dense.eval(), pair)
    except Exception as error:  # a defect of hf_lop
        return Head(autos, cls, fault=f"{type(error).__name__}: {error}"[:600])
    return Head(autos, cls, compared=compared, info=report(info), digest=digest(head, info))


def _check_weights(head: PreTrainedModel, dense: PreTrainedModel, pair: _Pair, missing: set[str]) -> None:
    state, cut = head.state_dict(), False
    for name, tensor in dense.state_dict().items():
        if name not in missing:
            expected = pair.expected(tensor)
            assert any(torch.equal(state[name], value) for value in expected), f"{name} is not what was saved"
            cut |= state[name].shape != tensor.shape
    if layer_lists(text_configs(head)[0]):
        check_config(head, pair.widths)
    else:  # a head of another part than the decoder
        assert not cut, "no widths in its config"
        assert not hasattr(head.config, "pruning_config")


def _check_output(head: PreTrainedModel, dense: PreTrainedModel, pair: _Pair) -> bool:
    """Compare what the layers put out, where those of the dense head put out what the dense model's do."""
    ours, theirs = (layer_outputs(model, pair.inputs) for model in (head, dense))
    assert len(ours) == len(theirs), "the forward pass of the head stops elsewhere"
    if not theirs or not _equal(theirs, pair.outputs[1]):
        return False  # it reads its inputs in a way of its own
    assert _equal(ours, pair.outputs[0]), "its decoder puts out something else"
    return True


class _Done(Exception):
    """Every layer has run: what comes after it are heads, which may want labels or other inputs."""


@torch.no_grad()
def layer_outputs(model: PreTrainedModel, inputs: Inputs) -> list[torch.Tensor]:
    """What the FFN of every layer that these inputs reach puts out; nothing for a model that does not take them."""
    found: list[torch.Tensor] = []

    def keep(last: bool) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            found.append(output.clone())
            if last:
                raise _Done

        return hook

    try:
        units = find_units(model)
    except UnsupportedModelError:  # it has no decoder
        return found
    handles = [
        model.get_submodule(unit.output.module).register_forward_hook(keep(unit is units[-1])) for unit in units
    ]
    with contextlib.suppress(Exception):  # it is done, or wants other inputs: then what it did reach is compared
        model(**copy.deepcopy(inputs))
    for handle in handles:
        handle.remove()
    return found


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _bytes(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def report(info: dict[str, Any]) -> Report:
    """What a load says, in a form that JSON has."""
    return {key: sorted(map(str, values)) for key, values in info.items()}


def digest(model: PreTrainedModel, info: dict[str, Any]) -> str:
    """Return a hash of the weights that a load read, by their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in info["missing_keys"]:
            total.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
