"""Remembers the commit a config was read from: transformers resolves it while loading, and then forgets it.

Configs that would take all memory or time are refused here, before transformers builds them.
"""

import functools
import os
from typing import Any

from hf_lop.errors import CheckpointMismatchError
from hf_lop.units.checks import check_depth

LARGEST_CONFIG = 20_000_000  # bytes; an order of magnitude above those of large vocabularies of labels


def install() -> None:
    """Let `config._commit_hash` be the commit of a config read from the Hub or its cache. Idempotent.

    Provenance needs it: which commit of the base model was pruned, and by which commit of the pruner. The attribute never
    reaches a config.json, transformers leaves it out.
    """
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.utils.hub import extract_commit_hash

    read: Any = PreTrainedConfig._dict_from_json_file.__func__  # type: ignore[attr-defined]
    build: Any = PreTrainedConfig.from_dict.__func__  # type: ignore[attr-defined]
    if getattr(read, "_lop", False):
        return

    @functools.wraps(read)
    def _dict_from_json_file(cls: Any, json_file: Any) -> dict[str, Any]:
        _check_size(json_file)
        config_dict: dict[str, Any] = read(cls, json_file)
        for part in (config_dict, *config_dict.values()) if isinstance(config_dict, dict) else ():
            if isinstance(part, dict):
                check_depth(part.get("num_hidden_layers"))  # some configs build a list of that length
        if commit := extract_commit_hash(str(json_file), None):
            config_dict["_commit_hash"] = commit
        return config_dict

    @functools.wraps(build)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = build(cls, config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if commit := config_dict.get("_commit_hash"):
            config._commit_hash = commit
        return result

    _dict_from_json_file._lop = True  # type: ignore[attr-defined]
    PreTrainedConfig._dict_from_json_file = classmethod(_dict_from_json_file)  # type: ignore[assignment, method-assign]
    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[arg-type, assignment, method-assign]


def _check_size(json_file: Any) -> None:
    """Refuse a config that would take gigabytes of memory once it is parsed."""
    size = os.path.getsize(json_file)
    if size > LARGEST_CONFIG:
        raise CheckpointMismatchError(
            f"{json_file} has {size:,} bytes; at most {LARGEST_CONFIG:,} are read. No model needs such a config: do not use "
            "this repository."
        )
