"""The card of a pruned model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from hf_lop.errors import InvalidInputError
from hf_lop.hub.cards.facts import (
    PIPELINES,
    calibration_rows,
    cell,
    linked,
    loading,
    metadata,
    quoted,
    render,
    size_facts,
    when_judged,
    word,
)
from hf_lop.planning.blocks import read_blocks
from hf_lop.planning.show import groups, si


def multiples(made: Mapping[str, Any], dense: Sequence[int], widths: Sequence[int]) -> str | None:
    """Say what widths are multiples of, and which layers are kept whole; None for single neurons."""
    blocks = read_blocks(made["round_to"], len(widths))
    if blocks is None or max(blocks) == 1:
        return None
    layers = zip(dense, widths, blocks, strict=True)
    whole = [str(layer) for layer, (full, width, block) in enumerate(layers) if width == full and width % block]
    but = f", but for layer{'s'[: len(whole) - 1]} {', '.join(whole)}, kept whole" if whole else ""
    return " or ".join(map(str, sorted(set(blocks), reverse=True))) + but


def pruned_model_card(
    config: Mapping[str, Any],
    *,
    name: str,
    widths: Sequence[int],
    parameters: int,
    num_bytes: int,
    processor: str | None = None,
    base_data: Mapping[str, Any] | None = None,
    auto_maps: Mapping[str, str] | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of a pruned model.

    Args:
        config (`Mapping`): its config.json, with `pruning_config`, and `auto_map` unless it is a stock checkpoint.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        widths (`Sequence[int]`): `[L]` neurons kept in each layer.
        parameters (`int`): of the pruned model.
        num_bytes (`int`): of these parameters.
        processor (`str`, *optional*): "AutoProcessor" or "AutoTokenizer", where the repository has one.
        base_data (`Mapping`, *optional*): metadata of the base model's card; license and language are taken from it.
        auto_maps (`Mapping[str, str]`, *optional*): which Auto classes load which class of the model, where its config needs no
            `auto_map` to say so.
        tags (`Iterable[str]`): further tags of the card.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    made = config["pruning_config"]
    dense = made["dense_widths"]
    if len(dense) != len(widths):
        raise InvalidInputError(f"{len(widths)} of {len(dense)} layers are left, and which is not recorded.")
    load = loading(config.get("auto_map") or auto_maps or {}, config["architectures"][0], processor)
    before, after = made["dense_bytes"] / made["dense_parameters"], num_bytes / parameters
    base = linked(made.get("base_model"), made.get("base_revision"))
    pruner = linked(made.get("pruner"), made.get("pruner_revision"))
    sizes = [
        ("parameters", f"{made['dense_parameters']:,}", f"{parameters:,}", parameters / made["dense_parameters"]),
        ("memory of the weights", si(made["dense_bytes"], "B"), si(num_bytes, "B"), num_bytes / made["dense_bytes"]),
        ("FFN neurons", f"{sum(dense):,}", f"{sum(widths):,}", sum(widths) / sum(dense)),
    ]
    if "flops" in made:  # missing in repositories of earlier versions
        flops, dense_flops = made["flops"], made["dense_flops"]
        sizes.insert(2, ("FLOPs of the text decoder per token", si(dense_flops), si(flops), flops / dense_flops))
    estimate = made.get("estimated_divergence")
    version = made.get("hf_lop_version")
    method = (config.get("quantization_config") or {}).get("quant_method")
    saved_by = f"quantisation ({quoted(method)})" if method else "another dtype"
    provenance = {
        "base model": base or "on no Hub repository",
        "pruner": pruner or "on no Hub repository",
        "criterion": quoted(made["criterion"]),
    }
    if made.get("base_match") == "near":
        provenance["weights"] = "near those that the pruner was made of, such as a fine-tuned version's, not the same"
    if before_this := made.get("cut_before"):
        first = f"{before_this['ratio']:.1%} of the neurons by {quoted(before_this['method'])}"
        first += f", recovery {quoted(before_this['recovery'])}" if before_this.get("recovery") else ""
        there = linked(before_this.get("model"), before_this.get("revision"))
        provenance["cut in two steps"] = f"first {first}{f': {there}' if there else ''}"
    return render(
        "pruned_model.md.jinja",
        metadata(
            made.get("base_model"),
            "finetune",  # the Hub knows adapter, merge, quantized and finetune; pruned weights are changed weights
            base_data,
            library_name="transformers",
            pipeline_tag=PIPELINES.get(str(load["auto_class"])),
            tags=["lop", "pruned", *tags],
        ),
        name,
        **load,
        stock="auto_map" not in config,
        pipeline=PIPELINES.get(str(load["auto_class"])),
        base=base or f"A {quoted(config['model_type'])} model that is on no Hub repository",
        pruner=pruner,
        method=word(made["method"]),
        recovery=word(made["recovery"]) if made.get("recovery") else None,
        criterion=word(made["criterion"]),
        groups=groups(widths),
        multiples=multiples(made, dense, widths),
        judged=f", {when_judged(made.get('calibration'))}" if made.get("recovery") else "",
        estimate=f"{estimate:.2g}" if estimate is not None else None,
        dtype_note=(
            f"Part of the memory is saved by {saved_by}: {before:.3g} bytes per parameter before, {after:.3g} after."
            if abs(before / after - 1) > 0.01
            else None
        ),
        sizes=[(*row, f"{share - 1:+.1%}") for *row, share in sizes],
        **size_facts(dense, widths, made["dense_parameters"], parameters, num_bytes),
        neurons_removed=f"{sum(dense) - sum(widths):,}",
        dense_neurons=f"{sum(dense):,}",
        rows=[
            (layer, f"{full:,}", f"{kept:,}", f"{1 - kept / full:.1%}")
            for layer, (full, kept) in enumerate(zip(dense, widths, strict=True))
        ],
        provenance=[
            *provenance.items(),
            *calibration_rows(made.get("calibration")),
            *([("pruned with", f"hf_lop {cell(version)}")] if version else []),
        ],
    )
