"""The entry point that lmms-eval loads when it builds its list of models.

Importing this module imports hf_lop, which lets the concrete classes of transformers, and so lmms-eval's own wrappers,
load pruned repositories.
"""

from typing import Any


def manifests() -> list[Any]:
    """Return what lmms-eval shall add to its models: `--model hf_lop`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="hf_lop", chat_class_path="hf_lop.evaluation.lmms_model.LOPModel")]
