"""What completes a saved folder: remote code, processor, card and plot beside weights and config.

A repository of a pruned model has its remote code and its plot; an elastic one its pruner and its extra weights.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from hf_lop.hub.cards.elastic import elastic_card
from hf_lop.hub.cards.facts import MARKER
from hf_lop.hub.cards.pruned import pruned_model_card
from hf_lop.hub.cards.pruner import pruner_card
from hf_lop.hub.elastic.write import PRUNER, TRANSPOSED, save_transposed
from hf_lop.hub.read.names import hub_id
from hf_lop.hub.write.companions import PROCESSOR, TOKENIZER, base_metadata, copy_companions, matches
from hf_lop.hub.write.push import WEIGHTS
from hf_lop.hub.write.whole import write_whole
from hf_lop.planning.plots import plot_estimate, plot_plans, plot_widths
from hf_lop.units.configs import layer_counts, text_configs
from hf_lop.units.ship import remote_code

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_lop.learning.config import LOPConfig

SHOWN = (0.2, 0.3, 0.5, 0.7)  # pruning ratios on the cards of pruners and elastic models


def _write_figure(path: Path, figure: "Figure") -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def _write_card(directory: Path, card: ModelCard) -> None:
    """Write a card unless the folder has one of the user's own."""
    path = directory / "README.md"
    if not path.exists() or MARKER in path.read_text(encoding="utf-8", errors="replace"):
        write_whole(path, f"{card}\n".encode())


def auto_map(model_type: str, config_class: str) -> dict[str, str]:
    """Return the `auto_map` by which every Auto class of a model type loads through `modeling_lop.py`."""
    from transformers.models.auto import modeling_auto

    found = {"AutoConfig": config_class}
    for name, auto in vars(modeling_auto).items():
        mapping: Any = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and model_type in mapping._model_mapping:
            cls = mapping._model_mapping[model_type]
            found[name] = cls if isinstance(cls, str) else cls[0]
    return {name: f"modeling_lop.{cls}" for name, cls in found.items()}


def pruned_widths(model: "PreTrainedModel") -> list[int] | None:
    """Return what every layer keeps if hf_lop pruned the model, else None."""
    if not isinstance(getattr(model.config, "pruning_config", None), dict):
        return None
    return next(iter(layer_counts(text_configs(model)[0]).values()), None)


def save_pruned_extras(
    model: "PreTrainedModel", directory: str | Path, repo_id: str | None = None, *, tags: Iterable[str] = ()
) -> None:
    """Complete a folder to which transformers saved a pruned model, so that it loads anywhere.

    Adds `modeling_lop.py`, the `auto_map` in config.json, processor files of the model it was loaded from, card and plot.

    Args:
        model (`PreTrainedModel`): a pruned model.
        directory (`str` or `Path`): the folder.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        tags (`Iterable[str]`): further tags of the card.
    """
    directory = Path(directory)
    widths = pruned_widths(model)
    if widths is None or not (directory / "config.json").is_file():
        return
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = auto_map(config["model_type"], type(model.config).__name__)
    write_whole(directory / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    for name, code in remote_code().items():
        write_whole(directory / name, code)

    made = config["pruning_config"]
    processor, base_data = _companions(model, made, directory)
    parameters = list(model.parameters())
    card = pruned_model_card(
        config,
        name=repo_id or f"./{directory.resolve().name}",
        widths=widths,
        parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        processor=processor,
        base_data=base_data,
        tags=[*(model.model_tags or ()), *tags],
    )
    _write_card(directory, card)
    _write_figure(directory / "assets" / "widths.png", plot_widths(widths, made["dense_widths"]))


def _companions(
    model: "PreTrainedModel", made: Mapping[str, Any], directory: Path
) -> tuple[str | None, dict[str, Any]]:
    """Copy processor files; return the Auto class that reads them, and the metadata of the base model's card."""
    source, revision = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not source or (hub_id(source) is None and not Path(source).is_dir()):  # a folder that is gone
        source, revision = made.get("base_model"), made.get("base_revision")
    base_data = copy_companions(source, revision, directory) if source else {}
    names = [file.name for file in directory.iterdir()]
    processor, tokenizer = (any(matches(name, files) for name in names) for files in (PROCESSOR, TOKENIZER))
    return "AutoProcessor" if processor else "AutoTokenizer" if tokenizer else None, base_data


def save_elastic_extras(
    model: "PreTrainedModel",
    pruner: "PreTrainedModel",
    directory: str | Path,
    repo_id: str | None = None,
    *,
    tags: Iterable[str] = (),
) -> None:
    """Complete a folder to which transformers saved a model with sorted neurons, so that it is an elastic repository.

    Adds the extra weights and the pruner (see `hf_lop.hub.elastic.write`), processor files of the model it was loaded from, card
    and plot.

    Args:
        model (`PreTrainedModel`): a model that `make_elastic` sorted.
        pruner (`LOPPruner`): of the sorted model.
        directory (`str` or `Path`): the folder.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        tags (`Iterable[str]`): further tags of the card.
    """
    directory, made = Path(directory), model.config.elastic_config
    save_transposed(directory, cast(Any, pruner).learned().directions, cast(Any, pruner).config.sketch_rows)
    PreTrainedModel.save_pretrained(pruner, directory / PRUNER)  # without a card of its own
    processor, base_data = _companions(model, made, directory)
    config: Any = pruner.config
    shown = [ratio for ratio in SHOWN if config.min_ratio <= ratio <= config.max_ratio] or [config.max_ratio]
    plans = {ratio: cast(Any, pruner).plan(ratio).widths for ratio in shown}
    card = elastic_card(
        json.loads((directory / "config.json").read_text(encoding="utf-8")),
        config,
        plans,
        name=repo_id or f"./{directory.resolve().name}",
        auto_maps=auto_map(model.config.model_type, type(model.config).__name__),
        extra_bytes=sum(file.stat().st_size for name in WEIGHTS for file in (directory / TRANSPOSED).glob(name)),
        processor=processor,
        base_data=base_data,
        tags=[*(model.model_tags or ()), *tags],
    )
    _write_card(directory, card)
    _write_plots(directory, config, plans, lambda ratio: cast(Any, pruner).plan(ratio).widths)


def _write_plots(
    directory: Path,
    config: "LOPConfig",
    plans: Mapping[float, Sequence[int]],
    plan: Callable[[float], Sequence[int]],
) -> None:
    """Draw the plans that a card shows and, where there are probes, the estimated quality of all sizes."""
    _write_figure(directory / "assets" / "plans.png", plot_plans(plans, config.size.widths))
    if config.probes:
        curve = {
            ratio: config.estimate(plan(ratio)) or 0.0 for ratio in [config.max_ratio * i / 12 for i in range(13)]
        }
        found = {row["ratio"]: row["reward"] for row in config.search_table or () if "reward" in row}
        figure = plot_estimate(curve, found, (config.calibration or {}).get("reward"))
        _write_figure(directory / "assets" / "quality.png", figure)


def save_pruner_extras(
    config: "LOPConfig",
    plan: Callable[[float], Sequence[int]],
    directory: str | Path,
    repo_id: str | None = None,
    *,
    tags: Iterable[str] = (),
) -> None:
    """Write card and plots of a pruner.

    Args:
        config (`LOPConfig`): the pruner's config.
        plan (`Callable`): the widths `[L]` it plans for a pruning ratio.
        directory (`str` or `Path`): folder the pruner was saved to.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        tags (`Iterable[str]`): further tags of the card.
    """
    directory, low, high = Path(directory), config.min_ratio, config.max_ratio
    plans = {ratio: plan(ratio) for ratio in [r for r in SHOWN if low <= r <= high] or [high]}
    _write_plots(directory, config, plans, plan)
    card = pruner_card(
        config,
        plans,
        name=repo_id or f"./{directory.resolve().name}",
        base_data=base_metadata(config.base_model, config.base_revision) if config.base_model else None,
        tags=tags,
    )
    _write_card(directory, card)
