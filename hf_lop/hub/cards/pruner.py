"""The card of a pruner."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from hf_lop.hub.cards.facts import linked, metadata, plan_facts, quoted, render

if TYPE_CHECKING:
    from hf_lop.learning.config import LOPConfig


def pruner_card(
    config: "LOPConfig",
    plans: Mapping[float, Sequence[int]],
    *,
    name: str,
    base_data: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of a pruner.

    Args:
        config (`LOPConfig`): the pruner's config.
        plans (`Mapping[float, Sequence[int]]`): widths `[L]` it plans, by pruning ratio.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        base_data (`Mapping`, *optional*): metadata of the base model's card; license and language are taken from it.
        tags (`Iterable[str]`): further tags of the card.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    base = config.base_model
    code = base if base and base.isprintable() else "path/to/base"  # a line of its own would end the block of code
    dataset = str((config.calibration or {}).get("dataset"))
    return render(
        "pruner.md.jinja",
        metadata(
            base,
            "adapter",  # of the four relations the Hub knows, the one of a small repository that is applied to its base
            base_data,
            library_name="hf_lop",
            datasets=[dataset] if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,
            tags=["lop", "pruning", *tags],
        ),
        name,
        base_name=linked(base, None) or f"a {quoted(config.base_model_type)} model",
        base_code=json.dumps(code),
        base_shell=shlex.quote(code),
        benchmark=(
            "lop-paper  # MMBench, MME, MMMU and POPE" if _reads_images(config.base_model_type) else "hellaswag"
        ),
        sketch=config.sketch_rows > 0,
        min_ratio=f"{config.min_ratio:.3g}",
        max_ratio=f"{config.max_ratio:.3g}",
        **plan_facts(config, plans),
    )


def _reads_images(model_type: str | None) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
