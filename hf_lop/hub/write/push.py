"""Pushing a folder to the Hub in one commit."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_lop.errors import InvalidInputError
from hf_lop.hub.cards.facts import MARKER
from hf_lop.hub.write.collections import add_to_collection
from hf_lop.hub.write.whole import write_whole

# A push replaces all weights: a file of an earlier push must not be read in place of the new ones.
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
STALE = [*WEIGHTS, *(f"elastic/{name}" for name in WEIGHTS)]


def open_repository(
    repo_id: str, *, private: bool | None, token: str | bool | None, revision: str | None, create_pr: bool
) -> tuple[HfApi, str, str | None]:
    """Create repository and branch where missing; return the client, the full id, and the card if it is the user's own.

    Raises:
        InvalidInputError: if the Hub does not say whether there is a card.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(
            encoding="utf-8", errors="replace"
        )
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it is the Hub that was not reached
        raise InvalidInputError(
            f"The Hub did not answer whether {repo_id} has a README.md, so nothing was pushed. Try again."
        ) from error
    except EntryNotFoundError:
        return api, repo_id, None
    if MARKER in card:
        return api, repo_id, None
    warnings.warn(f"{repo_id} has a README.md of its own, which stays. Remove it there to get hf_lop's.", stacklevel=4)
    return api, repo_id, card


def push_folder(
    save: Callable[[Path, str], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
) -> CommitInfo:
    """Save to a temporary folder and push it in one commit. A card of the user's own on the Hub stays as it is.

    Args:
        save (`Callable[[Path, str], None]`): writes the files, given the folder and the full Hub id.
        repo_id (`str`): Hub repository; created if it does not exist.
        private (`bool`, *optional*): whether to create it private.
        token (`str` or `bool`, *optional*): Hub token; the one of `hf auth login` by default.
        revision (`str`, *optional*): branch; created if it does not exist.
        commit_message (`str`, *optional*): first line of the commit message.
        commit_description (`str`, *optional*): the rest of it.
        create_pr (`bool`): open a pull request instead of committing to the branch.
        collection (`str`, *optional*): title or slug of a collection to add the repository to, see `add_to_collection`.

    Returns:
        `CommitInfo`: the commit, with its URL.
    """
    api, repo_id, card = open_repository(repo_id, private=private, token=token, revision=revision, create_pr=create_pr)
    with tempfile.TemporaryDirectory() as folder:
        if card is not None:
            write_whole(Path(folder) / "README.md", card.encode())
        save(Path(folder), repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
            delete_patterns=STALE,
        )
    if collection is not None:
        add_to_collection(repo_id, collection, private=private, token=token)
    return commit
