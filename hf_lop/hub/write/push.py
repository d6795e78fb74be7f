"""Pushing a folder to the Hub in one commit."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from hf_lop.errors import InvalidInputError
from hf_lop.files import scratch_folder, write_whole
from hf_lop.hub.cards.facts import MARKER
from hf_lop.hub.read.made import KEPT
from hf_lop.hub.write.collections import add_to_collection
from hf_lop.units.ship import remote_code

# A push replaces all weights: a file of an earlier push must not be read in place of the new ones.
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
STALE = [*WEIGHTS, *(f"elastic/{name}" for name in WEIGHTS), KEPT, *remote_code()]


RETRIES = (1, 4)  # seconds to wait before a commit that the Hub failed is tried again


@dataclass(frozen=True, slots=True)
class Target:
    """A repository to push to; as a context, one that was made for the push vanishes with an error.

    Attributes:
        api (`HfApi`): the client.
        repo_id (`str`): the full id.
        card (`str`, *optional*): its card, if that is the user's own.
        new (`bool`): whether it was made for this push.
    """

    api: HfApi
    repo_id: str
    card: str | None
    new: bool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove a repository that was made for a push, if it failed."""
        if error is not None and self.new:
            self.api.delete_repo(self.repo_id, missing_ok=True)

    def upload(self, **options: Any) -> CommitInfo:
        """Push a folder in one commit, see `HfApi.upload_folder`; what the Hub itself fails at is tried again."""
        for wait in RETRIES:
            try:
                return cast(CommitInfo, self.api.upload_folder(repo_id=self.repo_id, **options))
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code < 500:
                    raise
            time.sleep(wait)
        return cast(CommitInfo, self.api.upload_folder(repo_id=self.repo_id, **options))


def open_repository(
    repo_id: str, *, private: bool | None, token: str | bool | None, revision: str | None, create_pr: bool
) -> Target:
    """Create repository and branch where missing.

    Raises:
        InvalidInputError: if the Hub does not say whether there is a card.
    """
    api, new = HfApi(token=token), True
    try:
        repo_id = api.create_repo(repo_id, private=private).repo_id
    except HfHubHTTPError:  # it is there, or may not be made
        new, repo_id = False, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
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
        return Target(api, repo_id, None, new)
    if MARKER in card:
        return Target(api, repo_id, None, new)
    warnings.warn(f"{repo_id} has a README.md of its own, which stays. Remove it there to get hf_lop's.", stacklevel=4)
    return Target(api, repo_id, card, new)


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
    with (
        open_repository(repo_id, private=private, token=token, revision=revision, create_pr=create_pr) as target,
        scratch_folder() as folder,
    ):
        if target.card is not None:
            write_whole(folder / "README.md", target.card.encode())
        save(folder, target.repo_id)
        commit = target.upload(
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
            delete_patterns=STALE,
        )
    if collection is not None:
        add_to_collection(target.repo_id, collection, private=private, token=token)
    return commit
