"""The command `train-predictor`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lop.cli.options import AsJson, Collection, Out, Private, PushTo, check_push, push, show


def train_predictor(
    pruner: Annotated[str, typer.Argument(help="Hub id or folder of a pruner.")],
    out: Out,
    predictor: Annotated[str, typer.Option(help="transformer, bilstm or mlp.")] = "transformer",
    table: Annotated[
        Path | None, typer.Option(help='JSON list of {"ratio": R, "ratios": [one per layer]} to train on instead.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and training order.")] = 0,
    push_to: PushTo = None,
    private: Private = False,
    collection: Collection = None,
    as_json: AsJson = False,
) -> None:
    """Train a pruner's predictor anew, on its own table of (R, layer ratios) pairs or on another."""
    from hf_lop.hub.write.whole import check_new

    check_push(push_to, collection)
    check_new(out)
    from hf_lop.planning.table import read_table
    from hf_lop.pruner.pruner import LOPPruner

    loaded = LOPPruner.from_pretrained(pruner)
    losses = loaded.train_predictor(predictor, table=read_table(table) if table else None, seed=seed, progress=True)
    loaded.save_pretrained(out)
    report: dict[str, Any] = {"out": str(out), "predictor": predictor, "epochs": len(losses), "loss": losses[-1]}
    report |= push(loaded, push_to, private=private, collection=collection)
    show(report, f"Saved {out}: {predictor}, mean squared error {losses[-1]:.2e} after {len(losses)} epochs.", as_json)
