"""The command `pull`: one size of an elastic repository."""

from typing import Annotated

import typer

from hf_lop.cli.options import (
    AsJson,
    Flops,
    Latency,
    Memory,
    Out,
    Params,
    Ratio,
    RoundTo,
    show,
)

RECOVERS = ("sketch", "none", "auto")  # of `pull`, which reads neither data nor weights that a size does not have


def pull(
    repository: Annotated[str, typer.Argument(help="Hub id or folder of an elastic repository.")],
    out: Out,
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = 1,
    recover: Annotated[
        str, typer.Option(help="What lets the kept neurons do the removed ones' work: sketch, none, or auto.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Get one size from an elastic repository as a pruned model; only what that weighs is read."""
    if recover not in RECOVERS:
        from hf_lop.errors import InvalidInputError

        raise InvalidInputError(
            f"--recover is {recover!r}; choose {', '.join(RECOVERS)}. Others need the whole model: see hf-lop prune."
        )
    from hf_lop.hub.write.whole import check_new

    check_new(out)
    from hf_lop.planning.budget import Budget
    from hf_lop.pruner.sizes import pull as pull_size

    budget = Budget.of(ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=round_to)
    made = pull_size(repository, out, budget, recover=None if recover == "none" else recover, revision=revision)
    text = f"Saved {out}: {made['parameters']:,} parameters. Load it with from_pretrained."
    show({"out": str(out), **made}, text, as_json)
