"""The commands of elastic repositories: `make-elastic`, and `pull` for one size of them."""

from typing import Annotated, Any

import typer

from hf_lop.cli.options import (
    AsJson,
    Collection,
    Device,
    Dtype,
    Flops,
    Latency,
    Memory,
    Out,
    Params,
    Private,
    PushTo,
    Ratio,
    RoundTo,
    blocks,
    check_push,
    note,
    place,
    push,
    show,
)

RECOVERS = ("sketch", "none", "auto")  # of `pull`, which reads neither data nor weights that a size does not have


def make_elastic(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    pruner: Annotated[str, typer.Option(help="Hub id or folder of its pruner.")],
    out: Out,
    device: Device = None,
    dtype: Dtype = None,
    push_to: PushTo = None,
    private: Private = False,
    collection: Collection = None,
    as_json: AsJson = False,
) -> None:
    """Make a repository that gives every size: the dense model with sorted neurons, and its pruner."""
    from hf_lop.hub.write.whole import check_new

    check_push(push_to, collection)
    check_new(out)
    from hf_lop.hub.elastic.write import TRANSPOSED
    from hf_lop.hub.read.load import load_model
    from hf_lop.pruner.prune import at_base
    from hf_lop.pruner.pruner import LOPPruner

    loaded = LOPPruner.from_pretrained(pruner)
    note(f"Loading {model}.")
    made = loaded.make_elastic(load_model(model, **at_base(loaded.config, model), **place(device, dtype)))
    made.save_pretrained(out)
    extra = sum(file.stat().st_size for file in (out / TRANSPOSED).iterdir())
    report: dict[str, Any] = {"out": str(out), "elastic_config": made.config.elastic_config, "extra_bytes": extra}
    report |= push(made, push_to, private=private, collection=collection)
    where = push_to or out
    show(report, f'Saved {out}. Load a size of it with from_pretrained("{where}", lop_ratio=0.3).', as_json)


def pull(
    repository: Annotated[str, typer.Argument(help="Hub id or folder of an elastic repository.")],
    out: Out,
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = "auto",
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

    budget = Budget.of(ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=blocks(round_to))
    made = pull_size(repository, out, budget, recover=None if recover == "none" else recover, revision=revision)
    text = f"Saved {out}: {made['parameters']:,} parameters. Load it with from_pretrained."
    show({"out": str(out), **made}, text, as_json)
