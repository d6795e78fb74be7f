"""Model cards, rendered from the templates in hub_cards: facts about a repository, and how to use it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import hf_lop

if TYPE_CHECKING:
    from hf_lop.configuration_lop import LOPConfig

# A card that holds this line is written anew at every save and push; without it, it is the user's own.
MARKER = "hf_lop writes this card anew at every save and push. Remove this line to keep a card of your own."
CITATION = f"""\
@article{{zhang2025lop,
  title   = {{LOP: Learning Optimal Pruning for Efficient On-Demand MLLMs Scaling}},
  author  = {{Zhang, Zhihan and Pan, Xiang and Wei, Hongchen and Chen, Zhenzhong}},
  journal = {{arXiv preprint arXiv:2506.12826}},
  year    = {{2025}}
}}

@software{{hf_lop,
  title   = {{hf\\_lop: learned pruning of multimodal LLMs}},
  author  = {{{{The hf\\_lop developers}}}},
  version = {{{hf_lop.__version__}}}
}}"""
PIPELINES = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
INHERITED = ("license", "license_name", "license_link", "language")


def _template(name: str) -> str:
    package = Path(hf_lop.__file__).parent
    folder = next(path for path in (package / "hub_cards", package.parent / "hub_cards") if path.is_dir())
    return str(folder / name)


def _memory(num_bytes: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def _repository(name: str | None, revision: str | None) -> str | None:
    """Link a Hub repository at its commit."""
    if not name:
        return None
    commit = f" at commit [`{revision[:12]}`](https://huggingface.co/{name}/tree/{revision})" if revision else ""
    return f"[{name}](https://huggingface.co/{name}){commit}"


def _cell(value: Any) -> str:
    """Put any value into one cell of a Markdown table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def pruned_model_card(
    config: Mapping[str, Any],
    *,
    name: str,
    widths: Sequence[int],
    parameters: int,
    num_bytes: int,
    processor: str | None = None,
    base_data: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of a pruned model.

    Args:
        config (`Mapping`): its config.json, with `auto_map` and `pruning_config`.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        widths (`Sequence[int]`): `[L]` neurons kept in each layer.
        parameters (`int`): of the pruned model.
        num_bytes (`int`): of these parameters.
        processor (`str`, *optional*): "AutoProcessor" or "AutoTokenizer", where the repository has one.
        base_data (`Mapping`, *optional*): metadata of the base model's card; license and language are taken from it.
        tags (`Iterable[str]`): further tags of the card.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    made = config["pruning_config"]
    dense = made["dense_widths"]
    loads_it = [auto for auto, cls in config["auto_map"].items() if cls.endswith(f".{config['architectures'][0]}")]
    auto_class = next((auto for auto in PIPELINES if auto in loads_it), loads_it[0] if loads_it else "AutoModel")
    before, after = made["dense_bytes"] / made["dense_parameters"], num_bytes / parameters
    base = _repository(made.get("base_model"), made.get("base_revision"))
    data = ModelCardData(
        base_model=made.get("base_model"),
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto_class),
        tags=["lop", "pruned", *tags],
        **{key: (base_data or {}).get(key) for key in INHERITED},  # type: ignore[arg-type]
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=_template("pruned_model.md.jinja"),
        title=Path(name).name,
        name=json.dumps(name),
        imports=", ".join(filter(None, (auto_class, processor))),
        auto_class=auto_class,
        processor=processor,
        processor_variable="processor" if processor == "AutoProcessor" else "tokenizer",
        base=f"Base model {base}" if base else "The base model is on no Hub repository",
        pruner=_repository(made.get("pruner"), made.get("pruner_revision")),
        method=made["method"],
        recovery=made.get("recovery"),
        criterion=made["criterion"],
        round_to=made["round_to"],
        dtype_note=(
            f"Part of the memory is saved by another dtype: {before:.3g} bytes per parameter before, {after:.3g} after."
            if abs(before / after - 1) > 0.01
            else None
        ),
        **_size(dense, widths, made["dense_parameters"], parameters, num_bytes),
        dense=_size(dense, dense, made["dense_parameters"], made["dense_parameters"], made["dense_bytes"]),
        neurons_removed=f"{sum(dense) - sum(widths):,}",
        changes=[
            f"{after / before - 1:+.1%}"
            for before, after in (
                (sum(dense), sum(widths)),
                (made["dense_parameters"], parameters),
                (made["dense_bytes"], num_bytes),
            )
        ],
        rows=[
            (layer, f"{full:,}", f"{kept:,}", f"{1 - kept / full:.1%}")
            for layer, (full, kept) in enumerate(zip(dense, widths, strict=True))
        ],
        citation=CITATION,
        marker=MARKER,
    )
    return card


def _size(
    dense: Sequence[int], widths: Sequence[int], dense_parameters: int, parameters: int, num_bytes: int
) -> dict[str, str]:
    return {
        "neurons": f"{sum(widths):,}",
        "neurons_share": f"{1 - sum(widths) / sum(dense):.1%}",
        "parameters": f"{parameters:,}",
        "parameters_share": f"{1 - parameters / dense_parameters:.1%}",
        "memory": _memory(num_bytes),
    }


def pruner_card(
    config: "LOPConfig", plans: Mapping[float, Sequence[int]], *, name: str, tags: Iterable[str] = ()
) -> ModelCard:
    """Render the card of a pruner.

    Args:
        config (`LOPConfig`): the pruner's config.
        plans (`Mapping[float, Sequence[int]]`): widths `[L]` it plans, by pruning ratio.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        tags (`Iterable[str]`): further tags of the card.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    size, base = config.size, config.base_model
    calibration = {f"calibration: {key}": value for key, value in (config.calibration or {}).items()}
    loss = config.predictor_loss
    provenance = {
        "base model": _repository(base, config.base_revision) or "on no Hub repository",
        "model type": f"`{config.base_model_type}`",
        "FFNs": f"{len(size.widths)} layers, {sum(size.widths):,} neurons",
        "criterion": f"`{config.criterion}`",
        **({key: _cell(value) for key, value in calibration.items()} or {"calibration": "not recorded"}),
        "sketch for recovery": f"{config.sketch_rows} directions per layer" if config.sketch_rows else "none",
        "predictor": f"`{config.predictor}`",
        "trained target ratios": f"{config.min_ratio:.3g} to {config.max_ratio:.3g}",
        "training pairs": len(config.search_table or ()),
        "training error": "not recorded" if loss is None else f"{loss:.2e} mean squared error of a layer's ratio",
    }
    data = ModelCardData(base_model=base, library_name="hf_lop", tags=["lop", "pruning", *tags])
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=_template("pruner.md.jinja"),
        title=Path(name).name,
        name=json.dumps(name),
        base_name=f"[{base}](https://huggingface.co/{base})" if base else f"a `{config.base_model_type}` model",
        base_code=json.dumps(base or "path/to/base"),
        sketch=config.sketch_rows > 0,
        min_ratio=f"{config.min_ratio:.3g}",
        max_ratio=f"{config.max_ratio:.3g}",
        dense=_size(size.widths, size.widths, size.parameters, size.parameters, size.num_bytes),
        rows=[_size(size.widths, w, size.parameters, size.parameters_at(w), size.bytes_at(w)) for w in plans.values()],
        provenance=[(_cell(key), value) for key, value in provenance.items()],
        citation=CITATION,
        marker=MARKER,
    )
    return card
