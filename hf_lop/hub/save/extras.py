"""What completes a saved folder: remote code, processor, card and plot beside weights and config.

A repository of a pruned model has its remote code and its plot; an elastic one its pruner and its extra weights.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from hf_lop.errors import LOPError
from hf_lop.files import write_whole
from hf_lop.hub.cards.elastic import elastic_card
from hf_lop.hub.cards.facts import MARKER, plain_card
from hf_lop.hub.cards.pruned import pruned_model_card
from hf_lop.hub.cards.pruner import pruner_card
from hf_lop.hub.elastic.write import PRUNER, TRANSPOSED, save_transposed
from hf_lop.hub.read.checkpoint import open_shards
from hf_lop.hub.read.kept import kept_of, pack
from hf_lop.hub.read.made import KEPT
from hf_lop.hub.read.names import is_hub_id, origin
from hf_lop.hub.write.companions import PROCESSOR, TOKENIZER, base_metadata, copy_companions, matches
from hf_lop.hub.write.push import WEIGHTS
from hf_lop.hub.write.stock import as_stock
from hf_lop.planning.plots import plot_estimate, plot_plans, plot_widths
from hf_lop.units.measure import count_parameters
from hf_lop.units.ship import remote_code
from hf_lop.units.slice import cut_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_lop.learning.config import LOPConfig

SHOWN = (0.2, 0.3, 0.5, 0.7)  # pruning ratios on the cards of pruners and elastic models


def _write_figure(path: Path, draw: "Callable[[], Figure]") -> None:
    """Draw and write a figure. It never fails a save: what could not be drawn is said, and is not there."""
    try:
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png")
    except Exception as error:  # whatever a config can hold that is not what a plot shows
        warnings.warn(f"{path.name} could not be drawn: {type(error).__name__}: {error}", stacklevel=4)
        path.unlink(missing_ok=True)  # of an earlier save, of something else
    else:
        write_whole(path, buffer.getvalue())


def stale_weights(new: Path, old: Path) -> list[Path]:
    """Return weights of an earlier save in another layout: loaders prefer a whole file to shards, old or not."""
    found = []
    for part in ("", TRANSPOSED, PRUNER):
        names = {path.name for pattern in WEIGHTS for path in (new / part).glob(pattern)}
        there = [path for pattern in WEIGHTS for path in (old / part).glob(pattern)]
        found += [path for path in there if names and path.name not in names]
    code = [old / name for name in remote_code() if not (new / name).exists()]
    return [*found, *code] if (new / KEPT).exists() else [*found, *code, old / KEPT]


def _write_card(directory: Path, out: Path, name: str, card: Callable[[], ModelCard]) -> None:
    """Write a card unless the folder has one of the user's own. It never fails a save, but says what it could not show."""
    path, there = directory / "README.md", out / "README.md"
    if there.exists() and MARKER not in there.read_text(encoding="utf-8", errors="replace"):
        return
    try:
        content = f"{card()}\n".encode()
    except Exception as error:  # whatever a config can hold that is not what a card shows
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"The card of {name} says only how to load it, as facts of its config are odd: {reason}", stacklevel=4
        )
        content = f"{plain_card(name, reason)}\n".encode(errors="replace")
    write_whole(path, content)


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
    """Return what every layer keeps if hf_lop cut the model, or the one that this is a part of, else None."""
    return next(iter(cut_counts(model).values()), None)


def save_pruned_extras(
    model: "PreTrainedModel",
    directory: Path,
    repo_id: str | None = None,
    *,
    out: Path | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Complete a folder to which transformers saved a pruned model, so that it loads anywhere.

    Adds `modeling_lop.py` and the `auto_map` in config.json, unless all layers are alike and the stock class loads them; the
    numbers of the kept pieces, processor files of the model it was loaded from, card and plot.

    Args:
        model (`PreTrainedModel`): a pruned model.
        directory (`Path`): the folder.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        out (`Path`, *optional*): where its files go from there; what is there of the user's own stays.
        tags (`Iterable[str]`): further tags of the card.
    """
    out, widths = out or directory, pruned_widths(model)
    if widths is None or not (directory / "config.json").is_file():
        return
    auto_maps = auto_map(model.config.model_type, type(model.config).__name__)
    with as_stock(model) as stock:
        if stock:
            model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not stock:
        config["auto_map"] = auto_maps
        write_whole(directory / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        for file, code in remote_code().items():
            write_whole(directory / file, code)

    _write_kept(model, directory)
    made = config.get("pruning_config") or {}
    processor, base_data = _companions(model, made, directory, out)
    name = repo_id or f"./{out.resolve().name}"
    _write_figure(directory / "assets" / "widths.png", lambda: plot_widths(widths, made["dense_widths"]))
    _write_card(
        directory,
        out,
        name,
        lambda: pruned_model_card(
            config,
            auto_maps=auto_maps,
            name=name,
            widths=widths,
            parameters=count_parameters(model),
            num_bytes=weight_bytes(model, directory),
            processor=processor,
            base_data=base_data,
            tags=[*(model.model_tags or ()), *tags],
        ),
    )


def _write_kept(model: "PreTrainedModel", directory: Path) -> None:
    """Write which pieces the model kept, where that is known."""
    try:
        kept = kept_of(model)
    except LOPError as error:
        warnings.warn(f"Which pieces this model kept is not saved, so it can be cut no further: {error}", stacklevel=5)
        return
    if kept is not None:
        write_whole(directory / KEPT, pack(kept))


def _companions(
    model: "PreTrainedModel", made: Mapping[str, Any], directory: Path, out: Path
) -> tuple[str | None, dict[str, Any]]:
    """Copy processor files; return the Auto class that reads them, and the metadata of the base model's card."""
    source, revision = origin(model)
    if source is None and model.name_or_path and Path(model.name_or_path).is_dir():
        source = str(model.name_or_path)
    if source is None:
        source, revision = (
            value if is_hub_id(made.get("base_model")) and isinstance(value := made.get(key), str) else None
            for key in ("base_model", "base_revision")
        )
    base_data = copy_companions(source, revision, directory, there=out) if source else {}
    names = [file.name for folder in (directory, out) if folder.is_dir() for file in folder.iterdir()]
    processor, tokenizer = (any(matches(name, files) for name in names) for files in (PROCESSOR, TOKENIZER))
    return "AutoProcessor" if processor else "AutoTokenizer" if tokenizer else None, base_data


def weight_bytes(model: "PreTrainedModel", directory: Path) -> int:
    """Return the bytes of a model's weights: of a quantised one as they were saved, since it has more than parameters."""
    if getattr(model.config, "quantization_config", None) is None:
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with open_shards(directory) as shards:
        return sum(place.end - place.start for place in shards.places.values())


def save_elastic_extras(
    model: "PreTrainedModel",
    pruner: "PreTrainedModel",
    directory: Path,
    repo_id: str | None = None,
    *,
    out: Path | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Complete a folder to which transformers saved a model with sorted neurons, so that it is an elastic repository.

    Adds the extra weights and the pruner (see `hf_lop.hub.elastic.write`), processor files of the model it was loaded from, card
    and plot.

    Args:
        model (`PreTrainedModel`): a model that `make_elastic` sorted.
        pruner (`LOPPruner`): of the sorted model.
        directory (`Path`): the folder.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        out (`Path`, *optional*): where its files go from there; what is there of the user's own stays.
        tags (`Iterable[str]`): further tags of the card.
    """
    out, made = out or directory, model.config.elastic_config
    save_transposed(directory, cast(Any, pruner).learned().directions, cast(Any, pruner).config.sketch_rows)
    PreTrainedModel.save_pretrained(pruner, directory / PRUNER)  # without a card of its own
    processor, base_data = _companions(model, made, directory, out)
    config: Any = pruner.config
    shown = [ratio for ratio in SHOWN if config.min_ratio <= ratio <= config.max_ratio] or [config.max_ratio]
    plans = {ratio: cast(Any, pruner).plan(ratio).widths for ratio in shown}
    name = repo_id or f"./{out.resolve().name}"
    _write_card(
        directory,
        out,
        name,
        lambda: elastic_card(
            json.loads((directory / "config.json").read_text(encoding="utf-8")),
            config,
            plans,
            name=name,
            auto_maps=auto_map(model.config.model_type, type(model.config).__name__),
            extra_bytes=sum(file.stat().st_size for name in WEIGHTS for file in (directory / TRANSPOSED).glob(name)),
            processor=processor,
            base_data=base_data,
            tags=[*(model.model_tags or ()), *tags],
        ),
    )
    _write_plots(directory, config, plans, lambda ratio: cast(Any, pruner).plan(ratio).widths)


def _write_plots(
    directory: Path,
    config: "LOPConfig",
    plans: Mapping[float, Sequence[int]],
    plan: Callable[[float], Sequence[int]],
) -> None:
    """Draw the plans that a card shows and, where there are probes, the estimated quality of all sizes."""

    def quality() -> "Figure":
        shown = [config.max_ratio * i / 12 for i in range(13)]
        curve = {ratio: config.estimate(plan(ratio)) or 0.0 for ratio in shown}
        found = {row["ratio"]: row["reward"] for row in config.search_table or () if "reward" in row}
        return plot_estimate(curve, found, (config.calibration or {}).get("reward"))

    _write_figure(directory / "assets" / "plans.png", lambda: plot_plans(plans, config.size.widths))
    if config.probes:
        _write_figure(directory / "assets" / "quality.png", quality)


def save_pruner_extras(
    config: "LOPConfig",
    plan: Callable[[float], Sequence[int]],
    directory: Path,
    repo_id: str | None = None,
    *,
    out: Path | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Write card and plots of a pruner.

    Args:
        config (`LOPConfig`): the pruner's config.
        plan (`Callable`): the widths `[L]` it plans for a pruning ratio.
        directory (`Path`): folder the pruner was saved to.
        repo_id (`str`, *optional*): Hub id the card names; else the card names the folder.
        out (`Path`, *optional*): where its files go from there; a card of the user's own there stays.
        tags (`Iterable[str]`): further tags of the card.
    """
    out = out or directory
    low, high = config.min_ratio, config.max_ratio
    plans = {ratio: plan(ratio) for ratio in [r for r in SHOWN if low <= r <= high] or [high]}
    _write_plots(directory, config, plans, plan)
    name = repo_id or f"./{out.resolve().name}"
    base_data = base_metadata(config.base_model, config.base_revision) if config.base_model else None
    _write_card(directory, out, name, lambda: pruner_card(config, plans, name=name, base_data=base_data, tags=tags))
