"""What all cards share: the facts of a repository as the templates in hub_cards take them, and its metadata."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from hf_lop.hub.read.names import is_hub_id
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
    *("calibration_sha256", "search_sha256", "report_samples_sha256"),
    *("report_sha256", "seconds", "versions"),  # report_sha256: of pruners of version 0.1
)
PIPELINES = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
INHERITED = ("license", "license_name", "license_link", "language")


def render(template: str, data: ModelCardData, name: str, **facts: Any) -> ModelCard:
    """Render a card.

    Args:
        template (`str`): file of hub_cards.
        data (`ModelCardData`): its metadata.
        name (`str`): what `from_pretrained` takes: the Hub id, or a folder as seen from its parent.
        **facts: what else the template says.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    package = Path(__file__).parents[2]
    folder = next(path for path in (package / "hub_cards", package.parent / "hub_cards") if path.is_dir())
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(folder / template),
        title=Path(name).name,
        name=json.dumps(name),
        shell_name=shlex.quote(name),
        results_begin=RESULTS[0],
        results_end=RESULTS[1],
        citation=CITATION,
        marker=MARKER,
        **facts,
    )
    return card


def loading(auto_map: Mapping[str, str], architecture: str, processor: str | None) -> dict[str, str | None]:
    """How a model is loaded.

    Args:
        auto_map (`Mapping[str, str]`): classes by Auto class.
        architecture (`str`): class of the model.
        processor (`str`, *optional*): "AutoProcessor" or "AutoTokenizer", where the repository has one.
    """
    loads_it = [auto for auto, cls in auto_map.items() if cls.endswith(f".{architecture}")]
    auto_class = next((auto for auto in PIPELINES if auto in loads_it), loads_it[0] if loads_it else "AutoModel")
    return {
        "auto_class": auto_class,
        "imports": ", ".join(filter(None, (auto_class, processor))),
        "processor": processor,
        "processor_variable": "processor" if processor == "AutoProcessor" else "tokenizer",
    }


def linked(name: Any, revision: Any) -> str | None:
    """Link a Hub repository at its commit; what is no name of one is only quoted."""
    if not name:
        return None
    if not is_hub_id(name):
        return quoted(name)
    commit = ""
    if isinstance(revision, str) and re.fullmatch(r"[\w.\-/]+", revision):
        commit = f" at commit [`{revision[:12]}`](https://huggingface.co/{name}/tree/{revision})"
    return f"[{name}](https://huggingface.co/{name}){commit}"


def word(value: Any) -> str:
    """Return a word of a config, which anybody may have written, as it may stand within a line of Markdown code."""
    return cell(value).replace("`", "")[:200]


def quoted(value: Any) -> str:
    """Put such a word into Markdown, as code."""
    return f"`{word(value)}`"


def cell(value: Any) -> str:
    """Put any value into one cell of a Markdown table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def calibration_rows(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows on the data, the search and the time behind a pruner, from its config."""
    found = []
    facts = facts or {}  # from a file its keys come sorted, and say less
    for key in [*(known for known in CALIBRATION if known in facts), *sorted({*facts} - {*CALIBRATION})]:
        value = facts[key]
        name = key.replace("_samples_sha256", " data: SHA-256 of the samples, first 16 digits")
        name = name.replace("_sha256", " data: SHA-256 of the batches, first 16 digits")
        if key == "seconds" and isinstance(value, Mapping):
            value = {phase: f"{spent} s" for phase, spent in value.items()}
        found.append((name, value))
    return [(cell(name), cell(value)) for name, value in found] or [("calibration", "not recorded")]


def when_judged(calibration: Mapping[str, Any] | None) -> str:
    """Say whether the candidates of a search were recovered before they were judged."""
    return "after recovery from the sketch" if (calibration or {}).get("recovery") else "before recovery"


def size_facts(
    dense: Sequence[int], widths: Sequence[int], dense_parameters: int, parameters: int, num_bytes: int
) -> dict[str, str]:
    """What widths `[L]` leave of a model, and remove from it."""
    return {
        "neurons": f"{sum(widths):,}",
        "neurons_share": f"{1 - sum(widths) / sum(dense):.1%}",
        "parameters": f"{parameters:,}",
        "parameters_share": f"{1 - parameters / dense_parameters:.1%}",
        "memory": si(num_bytes, "B"),
    }


def plan_facts(config: "LOPConfig", plans: Mapping[float, Sequence[int]]) -> dict[str, Any]:
    """What a card says of the plans of a pruner: sizes, estimated quality where probes tell it, and provenance."""
    size, loss = config.size, config.predictor_loss
    estimates = {ratio: config.estimate(widths) for ratio, widths in plans.items()}
    shown = all(estimate is not None for estimate in estimates.values()) and bool(estimates)
    sizes = [["none", f"{size.parameters:,}", "", si(size.num_bytes, "B"), si(size.flops), *(["0"] * shown)]]
    for ratio, widths in plans.items():
        row = size_facts(size.widths, widths, size.parameters, size.parameters_at(widths), size.bytes_at(widths))
        cells = [row["neurons_share"], row["parameters"], f"-{row['parameters_share']}", row["memory"]]
        sizes.append([*cells, si(size.flops_at(widths)), *([f"{estimates[ratio]:.2g}"] if shown else [])])
    provenance = {
        "base model": linked(config.base_model, config.base_revision) or "on no Hub repository",
        "model type": quoted(config.base_model_type),
        "FFNs": f"{len(size.widths)} layers, {sum(size.widths):,} neurons",
        "criterion": quoted(config.criterion),
        **dict(calibration_rows(config.calibration)),
        "sketch for recovery": f"{config.sketch_rows} directions per layer" if config.sketch_rows else "none",
        "predictor": f"`{config.predictor}`",
        "trained target ratios": f"{config.min_ratio:.3g} to {config.max_ratio:.3g}",
        "training pairs": len(config.search_table or ()),
        "training error": "not recorded" if loss is None else f"{loss:.2e} mean squared error of a layer's ratio",
    }
    return {
        "sizes": sizes,
        "estimates": shown,
        "judged": when_judged(config.calibration),
        "provenance": list(provenance.items()),
    }


def metadata(base: str | None, relation: str, base_data: Mapping[str, Any] | None, **facts: Any) -> ModelCardData:
    """Metadata by which the Hub puts a repository under its base model, with the terms of the latter."""
    base = base if is_hub_id(base) else None
    inherited: dict[str, Any] = {key: (base_data or {}).get(key) for key in INHERITED}
    return ModelCardData(base_model=base, base_model_relation=relation if base else None, **inherited, **facts)


def plain_card(name: str, reason: str) -> ModelCard:
    """Render a card that says how to load a repository, and why it says no more."""
    return render("plain.md.jinja", ModelCardData(tags=["lop"]), name, reason=word(reason))
