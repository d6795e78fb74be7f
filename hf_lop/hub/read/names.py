"""Names of models and data sets: Hub ids, which anybody may read, and paths of this machine, which end up nowhere."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id


def is_hub_id(name: Any) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_id(name: str | Path | None) -> str | None:
    """Return a Hub id, or None for what can only be a path of this machine, also for one that is gone."""
    text = str(name or "")
    return text if is_hub_id(text) and not Path(text).exists() else None


def origin(model: Any) -> tuple[str | None, str | None]:
    """Return Hub id and commit of what a model or config was loaded from; both None where no commit came with the load.

    Without one, `out/model` may just as well be a folder that was here when it was loaded.
    """
    commit = getattr(getattr(model, "config", model), "_commit_hash", None)
    name = hub_id(getattr(model, "name_or_path", None)) if commit else None
    return (name, commit) if name else (None, None)
