"""The command `make-elastic`."""

from typing import Annotated, Any

import typer

from hf_lop.cli.options import (
    AsJson,
    Collection,
    Out,
    Private,
    PushTo,
    check_push,
    note,
    push,
    show,
)


def make_elastic(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    pruner: Annotated[str, typer.Option(help="Hub id or folder of its pruner.")],
    out: Out,
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
    from hf_lop.pruner.pruner import LOPPruner

    loaded = LOPPruner.from_pretrained(pruner)
    note(f"Loading {model}.")
    made = loaded.make_elastic(model)
    made.save_pretrained(out)
    extra = sum(file.stat().st_size for file in (out / TRANSPOSED).iterdir())
    report: dict[str, Any] = {"out": str(out), "elastic_config": made.config.elastic_config, "extra_bytes": extra}
    report |= push(made, push_to, private=private, collection=collection)
    where = push_to or out
    show(report, f'Saved {out}. Load a size of it with from_pretrained("{where}", lop_ratio=0.3).', as_json)
