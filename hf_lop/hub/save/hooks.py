"""Lets every pruned or elastic model save and push whole, and load at any size, whichever code calls transformers' methods."""

import functools
from collections.abc import Callable
from typing import Any

PREFIX = "lop_"  # begins the arguments of `from_pretrained` that ask for a size, such as `lop_ratio`


def install() -> None:
    """Hook `PreTrainedModel.save_pretrained` and `push_to_hub`; all other models pass through. Idempotent."""
    from transformers.modeling_utils import PreTrainedModel

    for name in ("save_pretrained", "push_to_hub"):
        original = getattr(PreTrainedModel, name)
        if not getattr(original, "_lop", False):
            setattr(PreTrainedModel, name, _hook(name, original))


def _hook(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        from hf_lop.hub.save import methods

        return getattr(methods, name)(original, self, *args, **kwargs)

    hooked._lop = True  # type: ignore[attr-defined]
    return hooked


def install_sizes(load: Callable[..., Any]) -> None:
    """Hook `PreTrainedModel.from_pretrained`; calls that ask for no size pass through. Idempotent.

    Args:
        load (`Callable`): called instead, with transformers' own method, the class, and the arguments, where one of these
            begins with "lop_".
    """
    from transformers.modeling_utils import PreTrainedModel

    original: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if getattr(original, "_lop", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(key.startswith(PREFIX) for key in kwargs):
            return load(original, cls, *args, **kwargs)
        return original(cls, *args, **kwargs)

    from_pretrained._lop = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
