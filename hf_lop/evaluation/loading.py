"""The model and processor to evaluate: by id, by id and pruner, or as they are in memory."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.hub.read.load import load_model, load_processor
from hf_lop.planning.budget import Budget
from hf_lop.planning.plan import check_feasible

# lmms-eval's own wrapper scales images to these limits; with the processor's wider ones, scores would not compare.
PIXELS = {"qwen2_5_vl": (256 * 28 * 28, 1605632)}


def load_evaluated(
    model: str | Path | PreTrainedModel,
    processor: Any = None,
    *,
    pruner: str | Path | None = None,
    ratio: float | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load what is not loaded yet, and prune it if asked to.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): Hub id or folder, or a model in memory.
        processor: its processor or tokenizer, by default that of the repository the model came from.
        pruner (`str` or `Path`, *optional*): Hub id or folder of a pruner.
        ratio (`float`, *optional*): fraction of FFN neurons it removes, in [0, 1).
        min_pixels (`int`, *optional*): of an image; only with a processor that is loaded here.
        max_pixels (`int`, *optional*): of an image; only with a processor that is loaded here.
        revision (`str`, *optional*): branch, tag or commit of `model`.
        trust_remote_code (`bool`): run the model code of the repository.
        **kwargs: passed to `from_pretrained` of the model.

    Returns:
        `tuple`: the model in evaluation mode, and its processor, which pads on the left.

    Raises:
        InvalidInputError: if pruner and ratio are not given together, or there is no such model or processor.
    """
    if (pruner is None) != (ratio is None):
        raise InvalidInputError(f"pruner is {pruner!r} and ratio is {ratio!r}; give both to prune, or neither.")
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded_pruner = None
    if pruner is not None:
        from hf_lop.pruner.pruner import LOPPruner

        loaded_pruner = LOPPruner.from_pretrained(pruner)
        check_feasible(loaded_pruner.config.size, Budget.of(ratio))  # before the model is fetched
    if isinstance(model, str | Path):
        source = str(model)
        model = load_model(source, **hub, **kwargs)
    else:
        source = str(model.name_or_path)
    if loaded_pruner is not None:
        loaded_pruner.prune(model, ratio)
    if processor is None:
        if not source:
            raise InvalidInputError("The model has no name to load a processor by. Pass processor=... as well.")
        processor = load_processor(source, **hub)
        least, most = _usual_pixels(model, processor)
        limits = {"min_pixels": min_pixels or least, "max_pixels": max_pixels or most}
        if limits := {name: value for name, value in limits.items() if value}:
            processor = load_processor(source, **hub, **limits)
    getattr(processor, "tokenizer", processor).padding_side = "left"
    return model.eval(), processor


def _usual_pixels(model: PreTrainedModel, processor: Any) -> tuple[int | None, int | None]:
    """Return the limits that scores of this family are measured with, unless the repository's own are narrower."""
    if model.config.model_type not in PIXELS:
        return None, None
    least, most = PIXELS[model.config.model_type]
    own = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    wide = own.get("shortest_edge", least) <= least and own.get("longest_edge", most) >= most
    return (least, most) if wide else (None, None)
