"""Collections of the Hub: one page for a base model's pruner and everything it made."""

import re
import warnings

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

# What the Hub calls a collection: owner, title and 24 hexadecimal digits. Anything else is a title.
_SLUG = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")


def add_to_collection(
    repo_id: str, collection: str, *, private: bool | None = None, token: str | bool | None = None
) -> str | None:
    """Add a model repository to a collection; one that is in it already stays there once.

    Args:
        repo_id (`str`): Hub id of the repository.
        collection (`str`): a title, such as "Pruned Qwen2.5-VL": that collection of the repository's owner, created if there
            is none; or the slug of a collection, such as "me/pruned-qwen-64f9a55bb3115b4f513ec026".
        private (`bool`, *optional*): whether to create it private.
        token (`str` or `bool`, *optional*): Hub token; the one of `hf auth login` by default.

    Returns:
        `str`: URL of the collection; None, after a warning, if the Hub refused: what was pushed before is not lost by that.
    """
    api = HfApi(token=token)
    try:
        slug = collection
        if not _SLUG.fullmatch(collection):
            owner = repo_id.partition("/")[0]
            slug = api.create_collection(collection, namespace=owner, private=bool(private), exists_ok=True).slug
        return api.add_collection_item(slug, repo_id, "model", exists_ok=True).url
    except (OSError, ValueError, HFValidationError) as error:
        warnings.warn(
            f"{repo_id} was pushed, but not added to the collection {collection!r}: {error}. Pushing again tries again, or "
            f"add it on the Hub.",
            stacklevel=3,
        )
        return None
