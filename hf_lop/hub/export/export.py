"""Pruned models in the formats of other runtimes: another spelling of the config, GGUF, and an ordinary padded model."""

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.files import scratch_folder, write_whole
from hf_lop.hub.cards.export import FORMATS, export_card
from hf_lop.hub.export.configs import check_field, per_layer_config
from hf_lop.hub.export.gguf_file import check_config, write_gguf
from hf_lop.hub.export.uniform import make_uniform
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.files import Folder
from hf_lop.hub.read.load import auto_class, load_model, read_config
from hf_lop.hub.read.names import hub_id
from hf_lop.hub.write.check import check_saved
from hf_lop.hub.write.companions import PROCESSOR, TERMS, TOKENIZER, copy_companions, matches, stays_inside
from hf_lop.hub.write.push import WEIGHTS, Target, open_repository
from hf_lop.hub.write.whole import check_new, check_replaceable, whole_folder
from hf_lop.learning.config import LOPConfig
from hf_lop.units.checks import DENSE_WIDTH
from hf_lop.units.configs import layer_widths
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.modeling_lop import OUTPUT_BIAS, enable_for
from hf_lop.units.ship import remote_code

# Formats of the version before, and what to do instead; to be removed with the next one.
GONE = {
    "anymodel": "Serve the pruned model as it is, by `vllm serve MODEL --model-impl transformers --trust-remote-code`, or "
    "export it as uniform.",
    "block_configs": "Export it as per_layer_config, which lists the same widths, or as uniform.",
}


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and what it saves.

    Attributes:
        format (`str`): one of `FORMATS`.
        out (`str`): the folder.
        files (`tuple[str, ...]`): what is in it.
        widths (`tuple[int, ...]`): `[L]` neurons of every layer as exported.
        parameters (`dict[str, int]`): of the model when "dense", when "pruned", and as "exported".
        neurons (`dict[str, int]`): FFN neurons, by the same keys.
        tested (`str`): which runtime has loaded this format, if any has.
        saves (`str`): what the format keeps of the saving.
        pushed_to (`str`, *optional*): URL of the commit.
    """

    format: str
    out: str
    files: tuple[str, ...]
    widths: tuple[int, ...]
    parameters: dict[str, int]
    neurons: dict[str, int]
    tested: str
    saves: str
    pushed_to: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        count = self.parameters
        lines = [
            f"Saved {self.out} as {self.format}: {', '.join(self.files)}.",
            f"Parameters: {count['dense']:,} dense, {count['pruned']:,} pruned, {count['exported']:,} exported.",
            self.saves,
            self.tested,
        ]
        return "\n".join([*lines, f"Pushed: {self.pushed_to}"] if self.pushed_to else lines)


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    push_to: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> Export:
    """Write a pruned model in the format of another runtime.

    Args:
        model (`str` or `Path`): Hub id or folder of a pruned model.
        to (`str`): "per_layer_config" (transformers), which changes the config only; "gguf" (llama.cpp); or "uniform",
            zero-padded to the widest layer for any runtime.
        out (`str` or `Path`): folder to write, new or empty; it appears whole or not at all.
        push_to (`str`, *optional*): Hub repository to push to as well, in one commit. In that of the pruned model itself a
            change of config sends no weights again.
        revision (`str`, *optional*): branch to push to, made where missing; named after the format by default, so that
            main keeps the pruned model.
        private (`bool`, *optional*): whether to create the repository private.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        `Export`: the files, and parameters before pruning, after it, and as exported.

    Raises:
        InvalidInputError: if the format is unknown, the folder is not empty, or there is no such model.
        UnsupportedModelError: if the model is not pruned, or the runtime cannot run it; the message says what can.
        MissingDependencyError: if "gguf" is asked for without the package.
        CheckpointMismatchError: if the checkpoint is damaged.
    """
    out = Path(out).resolve()  # "." has no name
    if to in GONE:
        raise InvalidInputError(f"There is no format {to!r} any more, as no release reads it. {GONE[to]}")
    if to not in FORMATS:
        raise InvalidInputError(f"There is no format {to!r}; choose one of {', '.join(FORMATS)}.")
    check_new(out)
    check_replaceable(out)
    config = read_config(model, token=token)
    widths, dense = _pruned_widths(str(model), config, to)
    if to == "gguf":
        check_config(config)
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config)
    size = measure_size(skeleton, find_units(skeleton))
    exported = [max(widths)] * len(widths) if to == "uniform" else widths
    plans = {"dense": dense, "pruned": widths, "exported": exported}
    parameters = {name: size.parameters_at(plan) for name, plan in plans.items()}
    neurons = {name: sum(plan) for name, plan in plans.items()}
    revision = revision or to.replace("_", "-")
    repository: AbstractContextManager[Target | None] = nullcontext()
    if push_to is not None:
        repository = open_repository(push_to, private=private, token=token, revision=revision, create_pr=False)
    with repository as target:
        with whole_folder(out) as folder:
            base_data = _write(str(model), config, to, folder, widths, max(dense), token)
            card = export_card(
                to,
                name=target.repo_id if target else f"./{out.name}",
                source=hub_id(model),
                made=getattr(config, "pruning_config", None) or {},
                auto_class=auto_class(config).__name__,
                file=next((path.name for path in folder.glob("*.gguf")), None),
                parameters=parameters,
                neurons=neurons,
                base_data=base_data,
                revision=revision if target else None,
            )
            write_whole(folder / "README.md", f"{card}\n".encode())
        url = None
        if target is not None:
            commit = target.upload(
                folder_path=out,
                revision=revision,
                commit_message=f"Export as {to}",
                ignore_patterns=None if target.card is None else ["README.md"],
                delete_patterns=list(WEIGHTS),
            )
            url = str(commit.commit_url)
    files = tuple(sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()))
    facts = FORMATS[to]
    return Export(to, str(out), files, tuple(exported), parameters, neurons, facts.tested, facts.saves, url)


def _pruned_widths(name: str, config: Any, to: str) -> tuple[list[int], list[int]]:
    """Return the widths of every layer after and before pruning.

    Raises:
        UnsupportedModelError: if the model is a pruner, not pruned, or has biases that the format cannot hold.
    """
    if isinstance(config, LOPConfig):
        raise UnsupportedModelError(
            f"{name} is a pruner, not a pruned model. Cut its base model, `hf-lop prune {config.base_model or 'MODEL'} "
            f"--pruner {name} --ratio 0.3 --out DIR`, and export DIR."
        )
    text = config.get_text_config(decoder=True)
    made, widths = getattr(config, "pruning_config", None), layer_widths(text)
    if widths is None and to == "gguf" and isinstance(made, dict):
        with torch.device("meta"):
            widths = [unit.count for unit in find_units(auto_class(config).from_config(config))]
    if widths is None:
        raise UnsupportedModelError(
            f"{name} has one FFN width for all layers, which every runtime reads as it is: use it without an export. Only what hf_lop "
            "pruned to widths that differ needs one."
        )
    if to == "per_layer_config":
        check_field(text)
    if to != "gguf" and getattr(text, OUTPUT_BIAS, False):
        raise UnsupportedModelError(
            f"{name} was pruned with recover='bias', and stock model code has no place for those biases. Prune again with "
            "recover='sketch', 'fold' or None; or export it as gguf, whose deci architecture takes them."
        )
    made = made or {}
    dense = made.get("dense_widths") or [getattr(text, DENSE_WIDTH, None) or max(widths)] * len(widths)
    return widths, dense


def _write(
    name: str,
    pruned: PreTrainedConfig,
    to: str,
    folder: Path,
    widths: list[int],
    dense: int,
    token: str | bool | None,
) -> dict[str, Any]:
    """Write all files but the card; return the metadata of the pruned model's card."""
    if to == "per_layer_config":
        source = _download(name, token)
        _copy_weights(source, folder)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        enable_for(type(pruned), config)  # reads sparse per_layer_config as a list
        config = per_layer_config(config, widths, dense)
        if "auto_map" in config:
            for name, code in remote_code().items():
                write_whole(folder / name, code)
        _write_config(folder, config, to, widths)
        return copy_companions(source, None, folder)
    model = load_model(name, config=pruned, token=token, device_map=None)
    if to == "gguf":
        write_gguf(
            model,
            _tokenizer(name, token),
            folder,
            Path(name).resolve().name if Path(name).is_dir() else Path(name).name,
        )
        with scratch_folder() as spare:  # the file holds the tokenizer: only the terms are for the folder
            metadata = copy_companions(name, None, spare, token=token)
            for path in spare.iterdir():
                if matches(path.name, TERMS):
                    shutil.copyfile(path, folder / path.name)
        return metadata
    make_uniform(model, dense)
    made = vars(model.config).pop("pruning_config", None)  # without it the model saves as the ordinary one it is now
    model.save_pretrained(folder)
    check_saved(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_config(folder, config | ({"pruning_config": made} if made else {}), to, widths)
    return copy_companions(name, None, folder, token=token)


def _copy_weights(source: Path, folder: Path) -> None:
    """Copy the files that hold the weights, and the generation config.

    Raises:
        CheckpointMismatchError: if weights are damaged, or a link leads out of the folder.
        InvalidInputError: if there are none.
    """
    with Shards(Folder(source)) as shards:
        files = {place.file for place in shards.places.values()}
    if SAFE_WEIGHTS_NAME not in files:
        files.add(SAFE_WEIGHTS_INDEX_NAME)
    if (source / GENERATION_CONFIG_NAME).is_file():
        files.add(GENERATION_CONFIG_NAME)
    for file in sorted(files):
        if not stays_inside(source / file, source):
            raise CheckpointMismatchError(
                f"{file} of {source} is a link to elsewhere, or in a folder below, so it is not exported. "
                "Put the file itself there."
            )
        shutil.copyfile(source / file, folder / file)


def _tokenizer(name: str, token: str | bool | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, token=token)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{name} has no tokenizer ({error}), and a GGUF file holds one. Save it beside the model: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)."
        ) from error


def _download(name: str, token: str | bool | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    wanted = [*WEIGHTS, "config.json", "generation_config.json", "README.md", *PROCESSOR, *TOKENIZER, *TERMS]
    try:
        return Path(huggingface_hub.snapshot_download(name, token=token, allow_patterns=wanted))
    except (OSError, HFValidationError) as error:
        raise InvalidInputError(f"{name} cannot be downloaded: {error} Pass a folder or a Hub id.") from error


def _write_config(folder: Path, config: dict[str, Any], to: str, widths: list[int]) -> None:
    """Write config.json with a note of what it was made from; loaders keep it and read nothing from it."""
    if isinstance(config.get("pruning_config"), dict):
        config["pruning_config"] = {**config["pruning_config"], "export": {"format": to, "widths": widths}}
    write_whole(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
