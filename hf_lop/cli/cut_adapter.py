"""The command `cut-adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lop.cli.options import AsJson, show


def cut_adapter(
    adapter: Annotated[str, typer.Argument(help="Hub id or folder of a LoRA of the dense model.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the pruned model.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter that fits it.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a LoRA of the dense model to fit a model that was pruned from it."""
    from hf_lop.hub.write.adapter import cut_adapter as cut

    done = cut(adapter, model, out, revision=revision)
    show(
        {"out": str(out), **done},
        f"Saved {out}: {done['cut']} of {done['tensors']} tensors were cut. Load it on {model} with PEFT.",
        as_json,
    )
