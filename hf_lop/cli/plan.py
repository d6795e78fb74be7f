"""The command `plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_lop.planning.plan import Plan

from hf_lop.cli.options import AsJson, Flops, Latency, Memory, Params, Ratio, RoundTo, blocks, note, show


def plan(
    pruner: Annotated[str, typer.Argument(help="Hub id or folder of a pruner.")],
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = "auto",
    plot: Annotated[Path | None, typer.Option(help="Write the plan as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the width of every layer for a budget; needs the pruner only, no model."""
    from hf_lop.pruner.pruner import LOPPruner

    made: Plan = LOPPruner.from_pretrained(pruner).plan(
        ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=blocks(round_to)
    )
    if plot is not None:
        made.plot(plot)
        note(f"Wrote {plot}.")
    show(made.to_dict(), str(made), as_json)
