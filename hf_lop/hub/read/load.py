"""Loading a model by id or folder with the class its config names, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.hub import cached_file

from hf_lop.errors import (
    CheckpointMismatchError,
    InvalidInputError,
    LOPError,
    MissingDependencyError,
    UnsupportedModelError,
)
from hf_lop.units.checks import check_depth
from hf_lop.units.configs import lists_within

# What transformers raises, among others, where a config holds what it did not expect.
ODD = (
    *(StrictDataclassError, LookupError, ValueError, AssertionError, ArithmeticError, AttributeError, RuntimeError),
    TypeError,
)


def check_safetensors(folder: Path) -> dict[str, str]:
    """Check that every safetensors file in a folder is as long as its header says.

    Returns:
        `dict[str, str]`: the dtype of every tensor, such as "BF16".

    Raises:
        CheckpointMismatchError: if a file is truncated or its header is damaged.
    """
    dtypes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:  # reads the header and compares it with the file's length
                dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointMismatchError(
                f"{path.name} in {folder} is truncated or damaged ({str(error)[:300]}). Download or copy it again."
            ) from error
    return dtypes


def check_dtypes(name: str, model: PreTrainedModel, dtypes: Mapping[str, str]) -> None:
    """Check that numbers were not read from integers or truth values, which loaders cast without a word; nor the reverse.

    Args:
        name (`str`): of the checkpoint.
        model (`PreTrainedModel`): what was loaded from it; what a quantiser packed is left to it.
        dtypes (`Mapping[str, str]`): of the stored tensors, where they are known.

    Raises:
        CheckpointMismatchError: if a tensor is of the other kind.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    for key, tensor in model.state_dict().items():
        if (stored := dtypes.get(key)) and _kind(stored) != _kind(str(tensor.dtype).removeprefix("torch.")):
            raise CheckpointMismatchError(
                f"{name}: {key} is stored as {stored}, and the model holds it as {tensor.dtype}. The file is damaged, or of a "
                "quantised model whose config does not say so: take both from the same commit."
            )


def _kind(dtype: str) -> str:
    """Return what kind of numbers a dtype is of, as safetensors or torch spell it: `BF16` or `bfloat16`."""
    letter = dtype.removeprefix("B" if dtype.startswith("BF") else "b" if dtype.startswith("bf") else "")[0].upper()
    return {"F": "floats", "C": "complex", "B": "truth values"}.get(letter, "integers")


def check_loaded(name: str, info: dict[str, Any], *, whole: bool = False) -> None:
    """Check that a checkpoint gave every weight of the model it was loaded into.

    Args:
        name (`str`): of the checkpoint.
        info (`dict`): what transformers says of its keys.
        whole (`bool`): refuse what the model has no place for, as well.

    Raises:
        CheckpointMismatchError: if a weight was missing or of another shape, so it would be random; or, with `whole`, left over.
    """
    if whole and (left := sorted(map(str, info.get("unexpected_keys") or ()))):
        raise CheckpointMismatchError(
            f"{name}: its config leaves {len(left)} stored tensors out, first {left[0][:200]}. The config does not fit the "
            "checkpoint: take both from the same commit."
        )
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise CheckpointMismatchError(
                f"{name}: {len(keys)} weights are {kind.split('_')[0]}, first {keys[0]}; they would be random. "
                "The checkpoint does not fit its config: take both from the same commit."
            )


def check_numbers_of(name: str, model: PreTrainedModel) -> None:
    """Check that all that a model holds is finite.

    Raises:
        CheckpointMismatchError: if something is not.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointMismatchError(
                f"{name}: {key} holds numbers that are not finite, so whatever it is used for would be wrong in silence. It was "
                "made of data that had such numbers, or it is damaged: fit it anew, or download it again."
            )


def read_config(name: str | Path, **hub: Any) -> PreTrainedConfig:
    """Read the config of a Hub id or folder; `hub` holds `revision`, `token` and the like.

    Raises:
        InvalidInputError: if there is none to be had.
    """
    try:
        # Without an answer, transformers would ask on the terminal whether to run a repository's own code.
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **hub})
    except LOPError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a config.json of no known model type
        if _is_adapter(name, error, hub):
            raise InvalidInputError(
                f"{name} holds an adapter, not a model. Load its base model with it (PEFT), call merge_and_unload, and pass that."
            ) from error
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} has code of its own, which hf_lop does not run: nobody could load a pruned model of it. Only models that "
                "transformers itself can build are pruned."
            ) from error
        raise InvalidInputError(
            f"{name} cannot be read as a model: {str(error)[:500]} Pass a folder or a Hub id."
        ) from error
    except ODD as error:
        raise CheckpointMismatchError(
            f"The config.json of {name} is damaged: {str(error)[:500]} Take it from the repository again."
        ) from error
    for part in (config, *(getattr(config, key, None) for key in getattr(type(config), "sub_configs", {}))):
        check_depth(getattr(part, "num_hidden_layers", None))  # before a model of that depth is built
    return config


def model_class(config: Any) -> Any:
    """Return the class that a config names, else the one that its Auto class would choose.

    Raises:
        UnsupportedModelError: if the model does not generate text, or transformers has no such class: it is of the repository's
            own code.
    """
    auto = auto_class(config)
    names = getattr(config, "architectures", None) or [None]
    named = names[0] if isinstance(names, list | tuple) else names
    if named is None:
        return _get_model_class(config, auto._model_mapping)
    found = getattr(transformers, str(named), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"Its config names the architecture {str(named)[:200]!r}, which transformers has not: code of its own, or a newer "
            "transformers. hf_lop prunes models that transformers itself can build, since nobody could load the others."
        )
    return found


def _is_adapter(name: str | Path, error: Exception, hub: Mapping[str, Any]) -> bool:
    """Whether what has no config.json has that of an adapter; the Hub is not asked where it has not answered before."""
    if Path(name).is_dir():
        return (Path(name) / "adapter_config.json").is_file()
    options = {key: hub[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in hub}
    try:
        return (
            "does not appear to have" in str(error) and cached_file(name, "adapter_config.json", **options) is not None
        )
    except OSError:
        return False


def auto_class(config: Any) -> Any:
    """Return the Auto class that loads a config's generating model: image-text-to-text if it has one, else causal LM."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise UnsupportedModelError(
        f"Model type {config.model_type!r} is neither an image-text-to-text nor a causal language model. "
        "Load the model with its own class and pass the object."
    )


def load_model(name: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model from a Hub id or a folder.

    Args:
        name (`str` or `Path`): Hub id or folder.
        config (`PreTrainedConfig`, *optional*): what `read_config` returned of it; read by default.
        **kwargs: passed to `from_pretrained` (such as `revision`, `dtype`, `device_map`, `token`); dtype is "auto" if
            not given.

    Returns:
        `PreTrainedModel`: in evaluation mode.

    Raises:
        InvalidInputError: if there is no such model.
        CheckpointMismatchError: if weights are missing, damaged, or do not fit the config.
        MissingDependencyError: if the config names a quantiser whose package is not installed.
        UnsupportedModelError: if the model does not generate text.
    """
    dtypes = check_safetensors(Path(name))
    if config is None:
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in kwargs}
        config = read_config(name, **hub)
    options = {"dtype": "auto", **kwargs, "config": config}
    options["ignore_mismatched_sizes"] = True  # check_loaded refuses them, and says why
    try:
        model, info = model_class(config).from_pretrained(name, output_loading_info=True, **options)
    except SafetensorError as error:
        raise CheckpointMismatchError(f"{name}: a weight file is damaged ({error}). Download it again.") from error
    except (LOPError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs a package that is not installed: {str(error)[:500]}") from error
    except ODD as error:
        raise CheckpointMismatchError(
            f"{name}: no model can be built from its configs ({type(error).__name__}: {str(error)[:300]}). Take them from the "
            "repository again, or look at the arguments."
        ) from error
    check_loaded(str(name), info, whole=any(lists_within(model.config)))  # a pruned one has what hf_lop saved, no more
    check_layers(str(name), model, info)
    check_dtypes(str(name), model, dtypes)
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_layers(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that a model has all layers that its checkpoint has.

    Raises:
        CheckpointMismatchError: if one is left over: the config names fewer, and what is computed without it is wrong.
    """
    lists = {key for key, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    for key in sorted(map(str, info.get("unexpected_keys") or ())):
        path = key.split(".")
        if any(part.isdecimal() and ".".join(path[:at]) in lists for at, part in enumerate(path)):
            raise CheckpointMismatchError(
                f"{name}: the checkpoint has {key}, a part of a layer that its config leaves out. The config does not fit the "
                "checkpoint: take both from the same commit."
            )


def load_processor(name: str | Path, **kwargs: Any) -> Any:
    """Load the processor of a model, or its tokenizer where it has no more.

    Args:
        name (`str` or `Path`): Hub id or folder.
        **kwargs: passed to `from_pretrained`.

    Raises:
        InvalidInputError: if there is neither.
    """
    try:
        return AutoProcessor.from_pretrained(name, **kwargs)
    except (OSError, ValueError):  # AutoProcessor raises either where a repository has a tokenizer only
        try:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"{name or 'The model'} has no processor and no tokenizer ({error}). Save them beside the model, or pass "
                "LOPPruner.fit a processor, or batches of your own."
            ) from error
