"""Model cards, rendered from the templates in hub_cards: facts about a repository, and how to use it."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from hf_lop.planning.show import si
from hf_lop.version import __version__

if TYPE_CHECKING:
    from hf_lop.learning.config import LOPConfig

# A card that holds this line is written anew at every save and push; without it, it is the user's own.
MARKER = "hf_lop writes this card anew at every save and push. Remove this line to keep a card of your own."
# Between these lines `push_results` puts a table of benchmark results.
RESULTS = ("<!-- results:begin -->", "<!-- results:end -->")
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
  version = {{{__version__}}}
}}"""
CALIBRATION = (
    *("dataset", "samples", "seed", "search", "reward", "recovery", "evaluations per target", "method"),
    *("calibration_sha256", "search_sha256", "report_sha256", "seconds", "versions"),
)
PIPELINES = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
INHERITED = ("license", "license_name", "license_link", "language")


def _template(name: str) -> str:
    package = Path(__file__).parents[2]
    folder = next(path for path in (package / "hub_cards", package.parent / "hub_cards") if path.is_dir())
    return str(folder / name)


def _repository(name: str | None, revision: str | None) -> str | None:
    """Link a Hub repository at its commit."""
    if not name:
        return None
    commit = f" at commit [`{revision[:12]}`](https://huggingface.co/{name}/tree/{revision})" if revision else ""
    return f"[{name}](https://huggingface.co/{name}){commit}"


def cell(value: Any) -> str:
    """Put any value into one cell of a Markdown table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _calibration(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows on the data, the search and the time behind a pruner, from its config."""
    found = []
    facts = facts or {}  # from a file its keys come sorted, and say less
    for key in [*(known for known in CALIBRATION if known in facts), *sorted({*facts} - {*CALIBRATION})]:
        value = facts[key]
        name = key.replace("_sha256", " data: SHA-256 of the batches, first 16 digits")
        if key == "seconds" and isinstance(value, Mapping):
            value = {phase: f"{spent} s" for phase, spent in value.items()}
        found.append((name, value))
    return [(cell(name), cell(value)) for name, value in found] or [("calibration", "not recorded")]


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
    pruner = _repository(made.get("pruner"), made.get("pruner_revision"))
    sizes = [
        ("parameters", f"{made['dense_parameters']:,}", f"{parameters:,}", parameters / made["dense_parameters"]),
        ("memory of the weights", si(made["dense_bytes"], "B"), si(num_bytes, "B"), num_bytes / made["dense_bytes"]),
        ("FFN neurons", f"{sum(dense):,}", f"{sum(widths):,}", sum(widths) / sum(dense)),
    ]
    if "flops" in made:  # missing in repositories of earlier versions
        flops, dense_flops = made["flops"], made["dense_flops"]
        sizes.insert(2, ("FLOPs of the text decoder per token", si(dense_flops), si(flops), flops / dense_flops))
    estimate = made.get("estimated_divergence")
    provenance = {
        "base model": base or "on no Hub repository",
        "pruner": pruner or "on no Hub repository",
        "criterion": f"`{made['criterion']}`",
    }
    card: ModelCard = ModelCard.from_template(
        _metadata(
            made.get("base_model"),
            "finetune",  # the Hub knows adapter, merge, quantized and finetune; pruned weights are changed weights
            base_data,
            library_name="transformers",
            pipeline_tag=PIPELINES.get(auto_class),
            tags=["lop", "pruned", *tags],
        ),
        template_path=_template("pruned_model.md.jinja"),
        title=Path(name).name,
        **_names(name),
        imports=", ".join(filter(None, (auto_class, processor))),
        auto_class=auto_class,
        pipeline=PIPELINES.get(auto_class),
        processor=processor,
        processor_variable="processor" if processor == "AutoProcessor" else "tokenizer",
        base=base or f"A `{config['model_type']}` model that is on no Hub repository",
        pruner=pruner,
        method=made["method"],
        recovery=made.get("recovery"),
        criterion=made["criterion"],
        round_to=made["round_to"],
        judged=f", {_judged(made.get('calibration'))}" if made.get("recovery") else "",
        estimate=f"{estimate:.2g}" if estimate is not None else None,
        dtype_note=(
            f"Part of the memory is saved by another dtype: {before:.3g} bytes per parameter before, {after:.3g} after."
            if abs(before / after - 1) > 0.01
            else None
        ),
        sizes=[(*row, f"{share - 1:+.1%}") for *row, share in sizes],
        **_size(dense, widths, made["dense_parameters"], parameters, num_bytes),
        neurons_removed=f"{sum(dense) - sum(widths):,}",
        dense_neurons=f"{sum(dense):,}",
        rows=[
            (layer, f"{full:,}", f"{kept:,}", f"{1 - kept / full:.1%}")
            for layer, (full, kept) in enumerate(zip(dense, widths, strict=True))
        ],
        provenance=[
            *provenance.items(),
            *_calibration(made.get("calibration")),
            *([("pruned with", f"hf_lop {version}")] if (version := made.get("hf_lop_version")) else []),
        ],
        citation=CITATION,
        marker=MARKER,
    )
    return card


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
    dataset = str((config.calibration or {}).get("dataset"))
    card: ModelCard = ModelCard.from_template(
        _metadata(
            base,
            "adapter",  # of the four relations the Hub knows, the one of a small repository that is applied to its base
            base_data,
            library_name="hf_lop",
            datasets=[dataset] if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,
            tags=["lop", "pruning", *tags],
        ),
        template_path=_template("pruner.md.jinja"),
        title=Path(name).name,
        **_names(name),
        base_name=f"[{base}](https://huggingface.co/{base})" if base else f"a `{config.base_model_type}` model",
        base_code=json.dumps(base or "path/to/base"),
        base_shell=shlex.quote(base or "path/to/base"),
        benchmark=(
            "lop-paper  # MMBench, MME, MMMU and POPE" if _reads_images(config.base_model_type) else "hellaswag"
        ),
        sketch=config.sketch_rows > 0,
        min_ratio=f"{config.min_ratio:.3g}",
        max_ratio=f"{config.max_ratio:.3g}",
        **_plans(config, plans),
        citation=CITATION,
        marker=MARKER,
    )
    return card


def _plans(config: "LOPConfig", plans: Mapping[float, Sequence[int]]) -> dict[str, Any]:
    """What a card says of the plans of a pruner: sizes, estimated quality where probes tell it, and provenance."""
    size, loss = config.size, config.predictor_loss
    estimates = {ratio: config.estimate(widths) for ratio, widths in plans.items()}
    shown = all(estimate is not None for estimate in estimates.values()) and bool(estimates)
    sizes = [["none", f"{size.parameters:,}", "", si(size.num_bytes, "B"), si(size.flops), *(["0"] * shown)]]
    for ratio, widths in plans.items():
        row = _size(size.widths, widths, size.parameters, size.parameters_at(widths), size.bytes_at(widths))
        cells = [row["neurons_share"], row["parameters"], f"-{row['parameters_share']}", row["memory"]]
        sizes.append([*cells, si(size.flops_at(widths)), *([f"{estimates[ratio]:.2g}"] if shown else [])])
    provenance = {
        "base model": _repository(config.base_model, config.base_revision) or "on no Hub repository",
        "model type": f"`{config.base_model_type}`",
        "FFNs": f"{len(size.widths)} layers, {sum(size.widths):,} neurons",
        "criterion": f"`{config.criterion}`",
        **dict(_calibration(config.calibration)),
        "sketch for recovery": f"{config.sketch_rows} directions per layer" if config.sketch_rows else "none",
        "predictor": f"`{config.predictor}`",
        "trained target ratios": f"{config.min_ratio:.3g} to {config.max_ratio:.3g}",
        "training pairs": len(config.search_table or ()),
        "training error": "not recorded" if loss is None else f"{loss:.2e} mean squared error of a layer's ratio",
    }
    judged = _judged(config.calibration)
    return {"sizes": sizes, "estimates": shown, "judged": judged, "provenance": list(provenance.items())}


def _size(
    dense: Sequence[int], widths: Sequence[int], dense_parameters: int, parameters: int, num_bytes: int
) -> dict[str, str]:
    return {
        "neurons": f"{sum(widths):,}",
        "neurons_share": f"{1 - sum(widths) / sum(dense):.1%}",
        "parameters": f"{parameters:,}",
        "parameters_share": f"{1 - parameters / dense_parameters:.1%}",
        "memory": si(num_bytes, "B"),
    }


def _metadata(base: str | None, relation: str, base_data: Mapping[str, Any] | None, **facts: Any) -> ModelCardData:
    """Metadata by which the Hub puts a repository under its base model, with the terms of the latter."""
    inherited: dict[str, Any] = {key: (base_data or {}).get(key) for key in INHERITED}
    return ModelCardData(base_model=base, base_model_relation=relation if base else None, **inherited, **facts)


def _reads_images(model_type: str | None) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _judged(calibration: Mapping[str, Any] | None) -> str:
    return "after recovery from the sketch" if (calibration or {}).get("recovery") else "before recovery"


def _names(name: str) -> dict[str, str]:
    """How a template writes a repository in Python and in a shell, and its other constants."""
    code, shell = json.dumps(name), shlex.quote(name)
    return {"name": code, "shell_name": shell, "results_begin": RESULTS[0], "results_end": RESULTS[1]}
