"""The command line: `hf-lop`. Data goes to stdout, progress and messages to stderr."""

import json
import signal
import sys
from typing import Annotated

import typer

from hf_lop.cli.compare import compare
from hf_lop.cli.cut_adapter import cut_adapter
from hf_lop.cli.elastic import make_elastic, pull
from hf_lop.cli.evaluate import evaluate
from hf_lop.cli.export import export
from hf_lop.cli.fit import fit
from hf_lop.cli.inspect import inspect
from hf_lop.cli.options import note
from hf_lop.cli.plan import plan
from hf_lop.cli.prune import prune
from hf_lop.cli.quickstart import quickstart
from hf_lop.cli.train_predictor import train_predictor
from hf_lop.version import __version__

app = typer.Typer(
    name="hf-lop",
    help="Learned pruning of multimodal LLMs: any size from one Hub repository.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help has brackets in it, which markup would take for its own
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
    cut_adapter,
    export,
    fit,
    train_predictor,
    compare,
    evaluate,
):
    app.command()(_command)


INTERRUPTED = 128 + signal.SIGINT  # the exit code that typer gives a command after Ctrl-C


def main() -> None:
    """Run the command line; an error the user can mend is one line on stderr and exit code 1, Ctrl-C one and 130.

    With `--json`, it is `{"error": message, "kind": name of its class}` on stdout as well.
    """
    from hf_lop.errors import LOPError

    try:
        app()
    except (LOPError, OSError) as error:
        note(f"Error: {error}")
        if "--json" in sys.argv[1:]:
            typer.echo(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            note("Interrupted. The same command goes on with what is kept, or starts anew.")
        raise
