"""The command `plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_lop.planning.plan import Plan

from hf_lop.cli.options import (
    AsJson,
    Device,
    Flops,
    Latency,
    Memory,
    Params,
    Ratio,
    RoundTo,
    blocks,
    note,
    place,
    show,
)


def plan(
    pruner: Annotated[str, typer.Argument(help="Hub id or folder of a pruner.")],
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = "auto",
    device: Device = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plan as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the width of every layer for a budget; needs the pruner only, no model."""
    from hf_lop.planning.budget import Budget

    budget = Budget.of(ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=blocks(round_to))
    if latency is None:  # torch is not imported: that would take twenty times as long as the plan
        from hf_lop.hub.read.made import read_planner

        made: Plan = read_planner(pruner, revision=revision).plan(budget)
    else:
        from hf_lop.pruner.pruner import LOPPruner

        where = place(device)["device_map"]
        made = LOPPruner.from_pretrained(pruner, revision=revision).to(where).plan_for(budget)
    if plot is not None:
        made.plot(plot)
        note(f"Wrote {plot}.")
    show(made.to_dict(), str(made), as_json)
