"""Lets every pruned model save and push whole, whichever code calls transformers' methods."""

import functools
from typing import Any


def install() -> None:
    """Hook `PreTrainedModel.save_pretrained` and `push_to_hub`; models that are not pruned pass through. Idempotent."""
    from transformers.modeling_utils import PreTrainedModel

    for name in ("save_pretrained", "push_to_hub"):
        original = getattr(PreTrainedModel, name)
        if not getattr(original, "_lop", False):
            setattr(PreTrainedModel, name, _hook(name, original))


def _hook(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        from hf_lop.hub import checkpoint

        return getattr(checkpoint, name)(original, self, *args, **kwargs)

    hooked._lop = True  # type: ignore[attr-defined]
    return hooked
