"""What a fit starts from: the model, and batches for calibration and search, made of what the caller has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.hub.read.load import load_model, load_processor
from hf_lop.learning.data import fitting_parts, part_batches, rows_fingerprint
from hf_lop.learning.processes import launched
from hf_lop.pruner.fit import Batches
from hf_lop.units.slice import prunable_units


@dataclass(frozen=True, slots=True)
class Samples:
    """How samples become batches; see [`~LOPPruner.fit`] for all of these."""

    processor: Any
    samples: int
    search_samples: int
    report_samples: int | None
    batch_size: int
    max_length: int | None
    seed: int


def from_samples(
    model: PreTrainedModel | str | Path, data: Any, how: Samples, loading: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, Batches, Batches, dict[str, Any]]:
    """Return the model, calibration and search batches, and what to record of the samples that they are made of.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        InvalidInputError: if there are too few samples, or they are of another kind.
    """
    parts, facts = fitting_parts(data, how.samples, how.search_samples, how.report_samples, how.seed)
    model = loaded(model, loading)
    processor = load_processor(str(model.name_or_path)) if how.processor is None else how.processor
    calibration, search = (
        part_batches(processor, part, parts[part], batch_size=how.batch_size, max_length=how.max_length)
        for part in ("calibration", "search")
    )
    if "report" in parts:
        facts["report_samples_sha256"] = rows_fingerprint(parts["report"])
    return model, calibration, search, facts


def loaded(model: PreTrainedModel | str | Path, loading: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a model that can be pruned, loaded if it is a name: as is asked for, else to the device of one of several processes.

    Raises:
        UnsupportedModelError: if it cannot be pruned; before its data is prepared.
    """
    if isinstance(model, str | Path):
        processes, options = launched(), dict(loading or {})
        if processes.count > 1:
            options.setdefault("device_map", processes.device)
        model = load_model(model, **options)
    elif loading:
        raise InvalidInputError("loading is for a model given by name; this one is loaded already. Leave it out.")
    prunable_units(model)
    return model
