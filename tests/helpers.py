"""What many tests ask of a model, and how they make a smaller one."""

import copy
import importlib.util
from pathlib import Path

import torch

from hf_lop.units.slice import prunable_units, slice_units
from tests.small_models import text_batches

ROOT = Path(__file__).parents[1]


@torch.no_grad()
def logits(model, batch=None):
    """`[B, T, V]` for a batch, or for the first of the text batches. Nothing of the model changes."""
    return model(**(batch or text_batches(1)[0]), use_cache=False).logits


def random_orders(units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(unit.count, generator=generator) for unit in units]


def random_kept(units, counts, seed=0):
    """So many pieces of every unit, drawn and in no order."""
    return [order[:count] for order, count in zip(random_orders(units, seed), counts, strict=True)]


def cut(model, order, widths):
    """A copy of the model with the first neurons of an order."""
    pruned = copy.deepcopy(model)
    slice_units(pruned, [indices[:width] for indices, width in zip(order, widths, strict=True)])
    return pruned


def orders(model, seed=0):
    return random_orders(prunable_units(model), seed)


def script(path):
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "examples" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
