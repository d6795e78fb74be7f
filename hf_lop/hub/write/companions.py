"""The files of a base model that its pruned checkpoints need: processor, tokenizer, chat template, license."""

import fnmatch
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from hf_lop.files import write_whole

PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name is one of these, or like one of these."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder itself: what a link to elsewhere points to could be pushed with it."""
    whole = folder.resolve()
    return file.resolve().parent in (
        whole,
        whole / TEMPLATES,
        whole.parent.parent / "blobs",
    )  # the Hub's cache links to its blobs


def copy_companions(
    source: str | Path,
    revision: str | None,
    destination: str | Path,
    *,
    there: Path | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Copy processor, tokenizer, chat template and license of a base model beside pruned weights.

    Only files of known names are copied, and only where missing: never weights or a card, and code only from a folder of the
    user's own, if a tokenizer or processor needs it.

    Args:
        source (`str` or `Path`): folder, or Hub id; offline, the local cache is used.
        revision (`str`, *optional*): commit, for a Hub id.
        destination (`str` or `Path`): folder to copy to.
        there (`Path`, *optional*): where the files go from there; what it has is not copied.
        token (`str` or `bool`, *optional*): for the Hub.

    Returns:
        `dict`: the metadata of the base model's card, empty without one.
    """
    folder, patterns = Path(source), (*PROCESSOR, *TOKENIZER, *TERMS)
    if not folder.is_dir():
        try:
            wanted = [*patterns, f"{TEMPLATES}/*.jinja", "README.md"]
            folder = Path(
                huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=wanted, token=token)
            )
        except (OSError, HFValidationError) as error:
            warnings.warn(
                f"The processor files of {source} could not be read ({type(error).__name__}), so they are not saved. "
                "Save them yourself: AutoProcessor.from_pretrained(...).save_pretrained(folder).",
                stacklevel=2,
            )
            return {}
    # Code that these files name is copied from a folder of the user's own, and left where it is on the Hub.
    code = (
        set()
        if folder != Path(source)
        else {f"{module}.py" for file in folder.glob("*_config.json") for module in code_beside(file)}
    )
    for file in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]):
        name = file.relative_to(folder)
        known = file.parent != folder or file.name in code or matches(file.name, patterns)
        if (
            not file.is_file()
            or not known
            or any((path / name).exists() for path in (Path(destination), there or folder / "-"))
        ):
            continue
        if stays_inside(file, folder):
            data = file.read_bytes()
            write_whole(
                Path(destination) / name, data if folder == Path(source) else _code_of(str(source), file.name, data)
            )
    return _metadata(folder / "README.md")


def _auto_map(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a JSON file, and which code it names by Auto class; both empty if it is none."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}, {}
    found = content.get("auto_map") if isinstance(content, dict) else None
    return (content, found) if isinstance(found, dict) else ({}, {})


def _classes(named: Any) -> list[str]:
    return [entry for entry in (named if isinstance(named, list) else [named]) if isinstance(entry, str)]


def code_beside(file: Path) -> set[str]:
    """Return the modules beside a file that it names as code."""
    named = [entry for value in _auto_map(file.read_bytes())[1].values() for entry in _classes(value)]
    return {entry.partition(".")[0] for entry in named if "--" not in entry}


def _code_of(source: str, name: str, data: bytes) -> bytes:
    """Let a file of a Hub repository say, as transformers does, that the code it names is there."""
    content, named = _auto_map(data) if name.endswith("_config.json") else ({}, {})
    if not named:
        return data

    def there(entry: Any) -> Any:
        return f"{source}--{entry}" if isinstance(entry, str) and "--" not in entry else entry

    for auto, value in named.items():
        named[auto] = [there(entry) for entry in value] if isinstance(value, list) else there(value)
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def base_metadata(repo_id: str, revision: str | None) -> dict[str, Any]:
    """Return the metadata of a card on the Hub, or of its copy in the cache; empty if there is neither."""
    try:
        return _metadata(huggingface_hub.hf_hub_download(repo_id, "README.md", revision=revision))
    except (OSError, HFValidationError, EntryNotFoundError):
        return {}


def _metadata(card: str | Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}  # no card, or one that the Hub cannot read either
    return metadata
