"""Options that several commands share, and how commands talk: data on stdout, the rest on stderr."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
Ratio = Annotated[float | None, typer.Option(help="Fraction of all FFN neurons to remove, in [0, 1).")]
Params = Annotated[float | None, typer.Option(help="Parameters the whole model may have, e.g. 6e9.")]
Memory = Annotated[str | None, typer.Option(help="Bytes its parameters may take, e.g. 6GB or 5.5GiB.")]
Flops = Annotated[float | None, typer.Option(help="FLOPs its text decoder may need per token.")]
Latency = Annotated[float | None, typer.Option(help="Seconds all FFNs may take per token on this device.")]
RoundTo = Annotated[
    str, typer.Option(help="Widths are multiples of this; auto: what the pruner was fitted with, else by the widths.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as cuda:0, mps or cpu; auto spreads over all there are. By default the GPU, if there is one."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Such as bfloat16; by default what is stored.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")]
PushTo = Annotated[str | None, typer.Option(help="Hub repository to push to as well.")]
Private = Annotated[bool, typer.Option("--private", help="Make the pushed repository private.")]
Collection = Annotated[
    str | None, typer.Option(help="Collection to add the pushed repository to: a title (made if new) or a slug.")
]


def blocks(round_to: str) -> Any:
    """Return `round_to` as functions take it."""
    return int(round_to) if round_to.isdecimal() else round_to


def place(device: str | None, dtype: str | None = None) -> dict[str, Any]:
    """Return what `from_pretrained` is told about where and in which dtype a model shall be.

    Raises:
        InvalidInputError: if there is no such device or dtype here.
    """
    import torch
    from accelerate import PartialState

    from hf_lop.errors import InvalidInputError

    device = device or str(PartialState().device)
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
            reason = str(error).splitlines()[0]
            raise InvalidInputError(
                f"--device is {device!r}, which is not to be had here: {reason} Use cpu."
            ) from error
    found = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InvalidInputError(f"--dtype is {dtype!r}; it must be a floating-point dtype of torch, such as bfloat16.")
    return {"device_map": device, **({} if found is None else {"dtype": found})}


def show(data: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout, for programs or for people."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)


def note(message: str) -> None:
    """Print a message on stderr."""
    typer.echo(message, err=True)


def check_push(push_to: str | None, collection: str | None) -> None:
    """Refuse a collection without a push.

    Raises:
        InvalidInputError: if there is a collection to add to, but nothing to add.
    """
    from hf_lop.errors import InvalidInputError

    if collection is not None and push_to is None:
        raise InvalidInputError(
            f"--collection {collection!r} is for a repository that is pushed. Add --push-to OWNER/NAME, or leave it out."
        )


def push(model: Any, push_to: str | None, *, private: bool, collection: str | None) -> dict[str, str | None]:
    """Push a model or pruner if asked to, and say where it is.

    Returns:
        `dict`: what a report says about it: `pushed_to`, and `collection`, None if it could not be added.
    """
    if push_to is None:
        return {}
    commit = model.push_to_hub(push_to, private=private)
    done: dict[str, str | None] = {"pushed_to": str(commit)}
    if collection is not None:
        from hf_lop.hub.write.collections import add_to_collection

        done["collection"] = add_to_collection(commit.repo_url.repo_id, collection, private=private)
    return done
