"""The card of an elastic repository."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from hf_lop.hub.cards.facts import PIPELINES, linked, loading, metadata, plan_facts, render
from hf_lop.planning.show import si

if TYPE_CHECKING:
    from hf_lop.learning.config import LOPConfig


def elastic_card(
    config: Mapping[str, Any],
    pruner: "LOPConfig",
    plans: Mapping[float, Sequence[int]],
    *,
    name: str,
    auto_maps: Mapping[str, str],
    extra_bytes: int,
    processor: str | None = None,
    base_data: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of an elastic repository.

    Args:
        config (`Mapping`): its config.json, with `elastic_config`.
        pruner (`LOPConfig`): config of its pruner.
        plans (`Mapping[float, Sequence[int]]`): widths `[L]` this plans, by pruning ratio.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        auto_maps (`Mapping[str, str]`): which Auto classes load which class of the model.
        extra_bytes (`int`): of the files beyond a dense checkpoint's.
        processor (`str`, *optional*): "AutoProcessor" or "AutoTokenizer", where the repository has one.
        base_data (`Mapping`, *optional*): metadata of the base model's card; license and language are taken from it.
        tags (`Iterable[str]`): further tags of the card.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    made = config["elastic_config"]
    load = loading(auto_maps, config["architectures"][0], processor)
    base = linked(made.get("base_model"), made.get("base_revision"))
    return render(
        "elastic_model.md.jinja",
        metadata(
            made.get("base_model"),
            "finetune",
            base_data,
            library_name="transformers",
            pipeline_tag=PIPELINES.get(str(load["auto_class"])),
            tags=["lop", "elastic", *tags],
        ),
        name,
        **load,
        base=f"This is {base}" if base else "This is a model that is on no Hub repository",
        pruner=linked(made.get("pruner"), made.get("pruner_revision")),
        extra=f"{si(extra_bytes, 'B')}, {extra_bytes / pruner.size.num_bytes:.0%} of the dense weights",
        sketch=pruner.sketch_rows > 0,
        **plan_facts(pruner, plans),
    )
