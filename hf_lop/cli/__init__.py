"""The command line: `hf-lop`. Data goes to stdout, progress and messages to stderr."""

import sys
from typing import Annotated

import typer

from hf_lop import __version__
from hf_lop.cli.comparing import compare
from hf_lop.cli.elastic import make_elastic, pull
from hf_lop.cli.exporting import export
from hf_lop.cli.fitting import fit, train_predictor
from hf_lop.cli.looking import inspect, plan
from hf_lop.cli.options import note
from hf_lop.cli.pruning import prune, quickstart
from hf_lop.evaluation.command import evaluate

app = typer.Typer(
    name="hf-lop",
    help="Learned pruning of multimodal LLMs: any size from one Hub repository.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for _command in (
    quickstart,
    inspect,
    plan,
    prune,
    make_elastic,
    pull,
    export,
    fit,
    train_predictor,
    compare,
    evaluate,
):
    app.command()(_command)


def main() -> None:
    """Run the command line; an error the user can mend is one line on stderr and exit code 1."""
    from hf_lop.modeling_lop import LOPError

    try:
        app()
    except (LOPError, OSError) as error:
        note(f"Error: {error}")
        sys.exit(1)
