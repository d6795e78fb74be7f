"""The command `quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lop.cli.options import (
    AsJson,
    show,
)


def quickstart(
    ratio: Annotated[float, typer.Option(help="Fraction of all FFN neurons to remove, in [0, 1).")] = 0.3,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and the plot.")] = Path("lop-quickstart"),
    as_json: AsJson = False,
) -> None:
    """Prune the embedded demo model, reload it without hf_lop, and compare it with the dense one."""
    from hf_lop.demo.quickstart import run

    report = run(ratio, out)
    show(report.to_dict(), str(report), as_json)
