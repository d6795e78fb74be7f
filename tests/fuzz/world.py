"""The undamaged things: models, pruners, journals in folders, made once in a process, and what they give."""

import contextlib
import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_lop import LOPPruner
from hf_lop.hub.read.load import load_model
from hf_lop.hub.save import extras
from hf_lop.pruner import fit as fitting
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking
from tests.fake_pruner import fake_pruner
from tests.small_models import CONFIGS, build, text_batches
from tests.tiny_models import tiny_inputs, tiny_model

WIDTHS = [40, 17, 48, 29]


class Blank:
    """Stands for a figure: drawing takes longer than the rest of a case."""

    def savefig(self, file: Any, **_: Any) -> None:
        Image.new("L", (1, 1)).save(file, format="png")


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Within it nothing is drawn, predictors train for a few epochs, and the disk is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_widths", "plot_plans", "plot_estimate"):
            patch.setattr(extras, name, lambda *_, **__: Blank())
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(fitting, "train_predictor", partial(fitting.train_predictor, epochs=2))
        yield


@dataclass(slots=True)
class Pruned:
    """A pruned model in a folder.

    Attributes:
        folder: as `save_pretrained` wrote it.
        masked: the dense model in a folder, with zeros for all that was cut: what stock transformers makes of it is right.
        inputs: a batch.
        logits: of the pruned model.
    """

    folder: Path
    masked: Path
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor


@dataclass(slots=True)
class World:
    """See the functions that make its parts, each when it is first asked for."""

    root: Path
    _made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            with quick():
                self._made[name] = make()
        return self._made[name]

    def dense(self) -> PreTrainedModel:
        """The dense model, a copy."""

        def make() -> PreTrainedModel:
            model = fresh("gated")
            model.save_pretrained(self.root / "dense")
            return load_model(self.root / "dense")

        return copy.deepcopy(self.once("dense", make))

    def pruned(self, kind: str) -> Pruned:
        return self.once(f"pruned {kind}", lambda: _pruned(kind, self.root))

    def pruner(self) -> Path:
        """A fitted pruner in a folder, with probes, table and sketch."""

        def make() -> Path:
            model = self.dense()
            pruner = LOPPruner.fit(
                model,
                text_batches(4),
                text_batches(2, seed=1),
                predictor="mlp",
                search="mcts",
                evaluations=3,
                targets=(0.2, 0.5),
                base_model="org/base",
                sketch_rows=8,
            )
            pruner.config.calibration["seconds"] = dict.fromkeys(pruner.config.calibration["seconds"], 0.1)
            pruner.save_pretrained(self.root / "pruner")
            return self.root / "pruner"

        return self.once("pruner", make)


@functools.cache
def world() -> World:
    holder = tempfile.TemporaryDirectory()
    made = World(Path(holder.name))
    made._made["holder"] = holder  # removed with the process
    return made


def fresh(kind: str) -> PreTrainedModel:
    if kind in CONFIGS:
        model = build(kind)
        model.config = copy.deepcopy(model.config)  # the models of a kind share it
        return copy.deepcopy(model)
    return tiny_model(kind)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**copy.deepcopy(inputs), use_cache=False).logits


def _pruned(kind: str, root: Path) -> Pruned:
    model = fresh(kind)
    inputs = text_batches(1)[0] if kind in CONFIGS else tiny_inputs(kind)
    units = find_units(model)
    masked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    kept = [torch.randperm(unit.count, generator=generator)[:width] for unit, width in zip(units, WIDTHS, strict=True)]
    with torch.no_grad():
        for unit, pieces in zip(find_units(masked), kept, strict=True):
            weight = masked.get_submodule(unit.output.module).weight
            gone = torch.ones(unit.count, dtype=torch.bool).index_fill(0, pieces, False)
            weight.index_fill_(unit.output.axis, gone.nonzero().flatten(), 0)
    with masking(model, units, kept):
        expected = logits(model, inputs)
    torch.testing.assert_close(logits(masked, inputs), expected)
    masked.save_pretrained(root / f"masked-{kind}")
    prune(model, kept)
    model.save_pretrained(root / f"pruned-{kind}")
    found = logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return Pruned(root / f"pruned-{kind}", root / f"masked-{kind}", inputs, found)


def prune(model: PreTrainedModel, kept: list[torch.Tensor]) -> None:
    """Cut a model to given pieces, with all that `LOPPruner.prune` records."""
    pruner = fake_pruner(model)
    pruner.config.base_model = "org/base"
    from hf_lop.planning.plan import Plan
    from hf_lop.pruner.prune import record
    from hf_lop.units.measure import measure_size
    from hf_lop.units.slice import slice_units

    size = measure_size(model, find_units(model))
    slice_units(model, kept)
    record(pruner.config, model, Plan(tuple(map(len, kept)), size))


def linked(source: Path, folder: Path, **changed: bytes) -> Path:
    """A folder with the files of another, but for those that changed: `config_json=...` is the file config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name.replace("_", "."): content for name, content in changed.items()}
    for path in source.iterdir():
        if path.is_file() and path.name not in names:
            os.link(path, folder / path.name)
    for name, content in names.items():
        (folder / name).write_bytes(content)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
