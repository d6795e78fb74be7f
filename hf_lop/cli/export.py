"""The command `export`."""

from typing import Annotated

import typer

from hf_lop.cli.options import AsJson, Out, Private, PushTo, note, show


def export(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a pruned model.")],
    to: Annotated[
        str,
        typer.Option(
            help="uniform (zero-padded to the widest layer, for any runtime), gguf (llama.cpp), or "
            "per_layer_config (transformers; a change of config only)."
        ),
    ],
    out: Out,
    push_to: PushTo = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; named after the format by default, so that main stays.")
    ] = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned model for another runtime; say what it saves there and whether that runtime was tried."""
    from hf_lop.hub.export.export import export as write

    note(f"Exporting {model}.")
    written = write(model, to, out, push_to=push_to, revision=revision, private=private)
    show(written.to_dict(), str(written), as_json)
