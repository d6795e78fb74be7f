"""Names of models and data sets: Hub ids, which anybody may read, and paths of this machine, which end up nowhere."""

from pathlib import Path


def hub_id(name: str | Path | None) -> str | None:
    """Return a Hub id, or None for a path of this machine, also for one that is gone."""
    text = str(name or "")
    is_path = text.startswith((".", "~", "/", "\\")) or Path(text).is_absolute() or Path(text).exists()
    return None if is_path or not text else text
