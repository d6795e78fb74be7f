"""The command `inspect`."""

from typing import Annotated, Any

import typer

from hf_lop.cli.options import AsJson, show


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another cut of the same base: show which pieces both kept instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's FFNs, its parameters by part, whether it can be pruned, and how it was."""
    if against is not None:
        return _overlap(model, against, as_json)
    from hf_lop.hub.read.made import inspect_made

    if (made := inspect_made(model, revision=revision)) is not None:
        return show(made, _described(made), as_json)
    from hf_lop.hub.read.inspect import inspect_model

    found = inspect_model(model, revision=revision)
    total = sum(found.parameters.values())
    lines = [f"{found.name}: {found.architecture} ({found.model_type}), {total:,} parameters"]
    lines += [f"  {part:<11} {count:>15,}  {count / total:6.1%}" for part, count in found.parameters.items()]
    lines.append("  can be pruned: " + ("yes" if found.reason is None else f"no. {found.reason}"))
    if found.pruned:
        lines += [f"  {key}: {value}" for key, value in found.pruned.items()]
    lines += [
        f"  layer {i:>3}  {f['width']:>6} neurons  {f['path']}: {', '.join(f['inputs'])} -> {f['output']}"
        for i, f in enumerate(found.to_dict()["ffns"])
    ]
    show(found.to_dict(), "\n".join(lines), as_json)
    return None


def _overlap(model: str, against: str, as_json: bool) -> None:
    from hf_lop.hub.read.kept import overlap

    found = overlap(model, against)
    lines = [
        f"{model} and {against} share {found.share:.1%} of the pieces of the smaller one; {found.by_chance:.1%} by chance.",
        *(
            f"  layer {layer:>3}  {left:>6} and {right:>6} of {dense}: {shared:>6} in both"
            for layer, (left, right, shared, dense) in enumerate(
                zip(found.left, found.right, found.shared, found.dense, strict=True)
            )
        ),
    ]
    show(found.to_dict(), "\n".join(lines), as_json)


def _described(facts: dict[str, Any]) -> str:
    """What hf_lop made, in lines."""
    total = facts.get("parameters", {}).get("total")
    lines = [
        f"{facts['name']}: {facts['kind']} ({facts['model_type']})" + (f", {total:,} parameters" if total else "")
    ]
    if facts["kind"] == "pruned":
        lines.append("  can be pruned further: " + ("yes" if facts["reason"] is None else f"no: {facts['reason']}"))
        lines += [f"  {key}: {value}" for key, value in facts["pruned"].items()]
        return "\n".join(lines)
    lines += [f"  made from {key}: {value}" for key, value in facts.get("elastic", {}).items()]
    lines += [f"  {key}: {value}" for key, value in facts["pruner"].items()]
    what = "hf-lop pull" if facts["kind"] == "elastic" else "hf-lop plan"
    return "\n".join([*lines, f"  {what} {facts['name']} --ratio 0.3 is the next step"])
