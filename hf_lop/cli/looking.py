"""Commands that only look: `inspect` and `plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_lop.plan import Plan

from hf_lop.cli.options import AsJson, Flops, Latency, Memory, Params, Ratio, RoundTo, note, show


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's FFNs, its parameters by part, whether it can be pruned, and how it was."""
    from hf_lop.inspection import inspect_model

    found = inspect_model(model, revision=revision)
    total = sum(found.parameters.values())
    lines = [f"{found.name}: {found.architecture} ({found.model_type}), {total:,} parameters"]
    lines += [f"  {part:<11} {count:>15,}  {count / total:6.1%}" for part, count in found.parameters.items()]
    lines.append("  can be pruned: " + ("yes" if found.reason is None else f"no. {found.reason}"))
    if found.pruned:
        lines += [f"  {key}: {value}" for key, value in found.pruned.items()]
    lines += [
        f"  layer {i:>3}  {f.width:>6} neurons  {f.path}: {', '.join(f.inputs)} -> {f.output}"
        for i, f in enumerate(found.ffns)
    ]
    show(found.to_dict(), "\n".join(lines), as_json)


def plan(
    pruner: Annotated[str, typer.Argument(help="Hub id or folder of a pruner.")],
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = 1,
    plot: Annotated[Path | None, typer.Option(help="Write the plan as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the width of every layer for one budget; needs the pruner only, no model."""
    from hf_lop.pruner import LOPPruner

    made: Plan = LOPPruner.from_pretrained(pruner).plan(
        ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=round_to
    )
    if plot is not None:
        made.plot(plot)
        note(f"Wrote {plot}.")
    show(made.to_dict(), str(made), as_json)
