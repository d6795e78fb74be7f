"""Learned pruning of multimodal LLMs as a Hugging Face Hub extension, after LOP (arXiv 2506.12826).

Importing hf_lop lets every transformers loader read checkpoints with one FFN width per decoder layer. It imports neither
torch nor transformers until something needs them.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from hf_lop.version import __version__

if TYPE_CHECKING:
    from hf_lop.errors import LOPError as LOPError
    from hf_lop.evaluation.comparison.compare import compare as compare
    from hf_lop.evaluation.reward import TaskReward as TaskReward
    from hf_lop.evaluation.run import evaluate as evaluate
    from hf_lop.hub.export.export import export as export
    from hf_lop.hub.read.inspect import inspect_model as inspect_model
    from hf_lop.hub.read.kept import overlap as overlap
    from hf_lop.hub.write.adapter import cut_adapter as cut_adapter
    from hf_lop.learning.config import LOPConfig as LOPConfig
    from hf_lop.learning.data import split_rows as split_rows
    from hf_lop.learning.importance import unit_importance as unit_importance
    from hf_lop.learning.statistics import collect_statistics as collect_statistics
    from hf_lop.planning.additive import additive_plans as additive_plans
    from hf_lop.planning.plan import Plan as Plan
    from hf_lop.pruner.pruner import LOPPruner as LOPPruner
    from hf_lop.units.kinds import find_units as find_units
    from hf_lop.units.slice import slice_units as slice_units

# Public name -> module that defines it; imported on first use.
_PUBLIC = {
    "LOPConfig": "hf_lop.learning.config",
    "LOPError": "hf_lop.errors",
    "LOPPruner": "hf_lop.pruner.pruner",
    "Plan": "hf_lop.planning.plan",
    "TaskReward": "hf_lop.evaluation.reward",
    "additive_plans": "hf_lop.planning.additive",
    "collect_statistics": "hf_lop.learning.statistics",
    "compare": "hf_lop.evaluation.comparison.compare",
    "cut_adapter": "hf_lop.hub.write.adapter",
    "evaluate": "hf_lop.evaluation.run",
    "export": "hf_lop.hub.export.export",
    "find_units": "hf_lop.units.kinds",
    "inspect_model": "hf_lop.hub.read.inspect",
    "overlap": "hf_lop.hub.read.kept",
    "slice_units": "hf_lop.units.slice",
    "split_rows": "hf_lop.learning.data",
    "unit_importance": "hf_lop.learning.importance",
}
# Names of version 0.1; they answer with a sentence for one release.
_RENAMED = {"find_ffns": "find_units", "slice_ffns": "slice_units", "neuron_importance": "unit_importance"}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(
            f"hf_lop.{name} is hf_lop.{_RENAMED[name]} since version 0.2: units are what can be pruned, FFN neurons among them."
        )
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_lop' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def _read_widths(_module: ModuleType) -> None:
    from hf_lop.hub.read import revisions
    from hf_lop.units import modeling_lop

    modeling_lop.install()
    revisions.install()


def _save_whole(_module: ModuleType) -> None:
    from hf_lop.hub.save import hooks

    hooks.install()
    hooks.install_sizes(_load_size)


def _load_size(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module("hf_lop.pruner.sizes").load_size(*args, **kwargs)


# Each runs at once if its module is there already, else when that is first imported.
wrapt.register_post_import_hook(_read_widths, "transformers.configuration_utils")
wrapt.register_post_import_hook(_save_whole, "transformers.modeling_utils")
