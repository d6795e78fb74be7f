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
RoundTo = Annotated[int, typer.Option(help="Widths are multiples of this.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")]
PushTo = Annotated[str | None, typer.Option(help="Hub repository to push to as well.")]
Private = Annotated[bool, typer.Option("--private", help="Make the pushed repository private.")]


def show(data: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout, for programs or for people."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)


def note(message: str) -> None:
    """Print a message on stderr."""
    typer.echo(message, err=True)


def new_folder(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        InvalidInputError: if it does.
    """
    from hf_lop.errors import InvalidInputError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{folder} exists and is not empty. Choose a new folder, or remove it first.")
