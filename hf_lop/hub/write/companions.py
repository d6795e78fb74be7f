"""The files of a base model that its pruned checkpoints need: processor, tokenizer, chat template, license."""

import fnmatch
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from hf_lop.hub.write.whole import write_whole

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
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name is one of these, or like one of these."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder itself: what a link to elsewhere points to could be pushed with it."""
    whole = folder.resolve()
    return file.resolve().parent in (whole, whole.parent.parent / "blobs")  # the Hub's cache links to its blobs


def copy_companions(
    source: str | Path, revision: str | None, destination: str | Path, *, token: str | bool | None = None
) -> dict[str, Any]:
    """Copy processor, tokenizer, chat template and license of a base model beside pruned weights.

    Only files of known names at the top level are copied, and only where missing: never weights, code or a card.

    Args:
        source (`str` or `Path`): folder, or Hub id; offline, the local cache is used.
        revision (`str`, *optional*): commit, for a Hub id.
        destination (`str` or `Path`): folder to copy to.
        token (`str` or `bool`, *optional*): for the Hub.

    Returns:
        `dict`: the metadata of the base model's card, empty without one.
    """
    folder, patterns = Path(source), (*PROCESSOR, *TOKENIZER, *TERMS)
    if not folder.is_dir():
        try:
            wanted = [*patterns, "README.md"]
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
    for file in sorted(folder.iterdir()):
        target = Path(destination) / file.name
        if not file.is_file() or not matches(file.name, patterns) or target.exists():
            continue
        if stays_inside(file, folder):
            write_whole(target, file.read_bytes())
    return _metadata(folder / "README.md")


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
