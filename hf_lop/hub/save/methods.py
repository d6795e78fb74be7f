"""Saving and pushing in place of transformers' methods, so that what hf_lop makes is complete wherever it goes."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lop.hub.elastic.write import kept_pruner
from hf_lop.hub.save.extras import pruned_widths, save_elastic_extras, save_pruned_extras, stale_weights
from hf_lop.hub.write.check import check_saved
from hf_lop.hub.write.companions import PROCESSOR, TERMS, TOKENIZER
from hf_lop.hub.write.push import STALE, open_repository, push_folder
from hf_lop.hub.write.stock import list_changed
from hf_lop.hub.write.whole import filled_folder
from hf_lop.units.slice import check_finished, list_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _saved_by_transformers(model: "PreTrainedModel") -> bool:
    """Whether hf_lop adds nothing: it did not make the model, or only adapters are saved."""
    made = pruned_widths(model) is not None or kept_pruner(model) is not None
    return not made or getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def _unmarked(model: "PreTrainedModel") -> Iterator[None]:
    """Leave out what says that a model is elastic: its pruner is not here, and its weights may have changed."""
    mark = vars(model.config).pop("elastic_config", None)
    try:
        yield
    finally:
        if mark is not None:
            model.config.elastic_config = mark


def save_pretrained(
    original: Callable[..., None],
    model: "PreTrainedModel",
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save as transformers does; the folder of a model that hf_lop made gets all it needs to load anywhere.

    Args:
        original (`Callable`): transformers' `PreTrainedModel.save_pretrained`.
        model (`PreTrainedModel`): any model.
        save_directory (`str` or `os.PathLike`): folder to write.
        is_main_process (`bool`): other processes write nothing beyond what transformers writes.
        state_dict (`dict`, *optional*): see transformers.
        push_to_hub (`bool`): push what was saved, in one commit.
        *args: see transformers.
        **kwargs: see transformers; for a pruned model `repo_id` is also the name its card uses.
    """
    check_finished(model)
    if _saved_by_transformers(model):
        with _unmarked(model):
            return original(model, save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
    directory = Path(save_directory)
    repo_id, tags = kwargs.pop("repo_id", None), kwargs.pop("tags", ())
    texts = {key: kwargs.pop(key, None) for key in ("commit_message", "commit_description")}
    target = {key: kwargs.pop(key, None) for key in ("private", "revision")}
    target["create_pr"] = kwargs.pop("create_pr", False)
    main = model.should_save_on_this_rank(is_main_process)
    if not main:
        original(model, directory, is_main_process, state_dict, False, *args, **kwargs)
        return

    def save() -> list[str]:
        variant = kwargs.get("variant") is not None
        with filled_folder(directory, (lambda *_: ()) if variant else stale_weights) as folder:
            original(model, folder, is_main_process, state_dict, False, *args, **kwargs)
            if pruner := kept_pruner(model):
                save_elastic_extras(model, pruner, folder, repo_id, out=directory, tags=tags)
            else:
                save_pruned_extras(model, folder, repo_id, out=directory, tags=tags)
            if not variant:
                original_format = kwargs.get("save_original_format", True)
                check_saved(model, folder, state_dict, save_original_format=original_format)
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    list_counts(model)
    list_changed(model)
    if not push_to_hub:
        save()
        return
    with open_repository(repo_id or directory.name, token=kwargs.get("token"), **target) as repository:
        repo_id = repository.repo_id
        saved = save()
        target.pop("private")
        repository.upload(
            folder_path=directory,
            allow_patterns=[*saved, *PROCESSOR, *TOKENIZER, *TERMS],
            ignore_patterns=None if repository.card is None else ["README.md"],
            delete_patterns=STALE,
            **target,
            **{**texts, "commit_message": texts["commit_message"] or "Upload model"},
        )


def push_to_hub(original: Callable[..., Any], model: "PreTrainedModel", repo_id: str, **kwargs: Any) -> Any:
    """Push as transformers does; a model that hf_lop made is pushed with all its files and its card in one commit.

    Args:
        original (`Callable`): transformers' `PreTrainedModel.push_to_hub`.
        model (`PreTrainedModel`): any model.
        repo_id (`str`): Hub repository.
        **kwargs: see transformers; for a pruned model also `collection`, the title or slug of a collection to add it to.

    Returns:
        `CommitInfo`: the commit, with its URL.
    """
    if _saved_by_transformers(model):
        return original(model, repo_id, **kwargs)
    tags = kwargs.pop("tags", None) or ()
    sharding = {key: kwargs.pop(key) for key in ("max_shard_size",) if key in kwargs}

    def save(folder: Path, repo_id: str) -> None:
        model.save_pretrained(folder, repo_id=repo_id, tags=[tags] if isinstance(tags, str) else tags, **sharding)

    return push_folder(save, repo_id, **kwargs)
