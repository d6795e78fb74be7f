"""Learned pruning of multimodal LLMs as a Hugging Face Hub extension, after LOP (arXiv 2506.12826).

Importing hf_lop lets every transformers loader read checkpoints with one FFN width per decoder layer. It imports neither
torch nor transformers until something needs them.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from hf_lop.allocation.additive import additive_plans as additive_plans
    from hf_lop.configuration_lop import LOPConfig as LOPConfig
    from hf_lop.errors import LOPError as LOPError
    from hf_lop.evaluation.run import evaluate as evaluate
    from hf_lop.ffn.discovery import find_ffns as find_ffns
    from hf_lop.ffn.importance import neuron_importance as neuron_importance
    from hf_lop.ffn.slicing import slice_ffns as slice_ffns
    from hf_lop.ffn.statistics import collect_statistics as collect_statistics
    from hf_lop.hub.exports import export as export
    from hf_lop.inspection import inspect_model as inspect_model
    from hf_lop.plan import Plan as Plan
    from hf_lop.pruner import LOPPruner as LOPPruner

__version__ = "0.1.0"

# Public name -> module that defines it; imported on first use.
_PUBLIC = {
    "LOPConfig": "hf_lop.configuration_lop",
    "LOPError": "hf_lop.errors",
    "LOPPruner": "hf_lop.pruner",
    "Plan": "hf_lop.plan",
    "additive_plans": "hf_lop.allocation.additive",
    "collect_statistics": "hf_lop.ffn.statistics",
    "evaluate": "hf_lop.evaluation.run",
    "export": "hf_lop.hub.exports",
    "find_ffns": "hf_lop.ffn.discovery",
    "inspect_model": "hf_lop.inspection",
    "neuron_importance": "hf_lop.ffn.importance",
    "slice_ffns": "hf_lop.ffn.slicing",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_lop' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def _read_widths(_module: ModuleType) -> None:
    from hf_lop import modeling_lop
    from hf_lop.hub import revisions

    modeling_lop.install()
    revisions.install()


def _save_whole(_module: ModuleType) -> None:
    from hf_lop.hub import hooks

    hooks.install()
    hooks.install_sizes(_load_size)


def _load_size(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module("hf_lop.pulling").load_size(*args, **kwargs)


# Each runs at once if its module is there already, else when that is first imported.
wrapt.register_post_import_hook(_read_widths, "transformers.configuration_utils")
wrapt.register_post_import_hook(_save_whole, "transformers.modeling_utils")
