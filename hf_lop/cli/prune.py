"""The command `prune`."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Annotated

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


def prune(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    pruner: Annotated[str, typer.Option(help="Hub id or folder of its pruner.")],
    out: Out,
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = "auto",
    method: Annotated[
        str,
        typer.Option(help="lop (predicted); additive, mcts, cmaes (searched); uniform, magnitude, wanda, flap."),
    ] = "lop",
    recover: Annotated[
        str,
        typer.Option(
            help="What lets the kept neurons do the removed ones' work: sketch (least squares without data), fold (their "
            "mean), none, or auto: sketch where the pruner has one."
        ),
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse another commit of the base model.")] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Cut from file to file: needs little memory, and goes on where a killed run stopped."
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    push_to: PushTo = None,
    private: Private = False,
    collection: Collection = None,
    as_json: AsJson = False,
) -> None:
    """Cut a model to a budget and save it, ready for from_pretrained; push it if asked to."""
    from hf_lop.hub.write.whole import check_new

    check_push(push_to, collection)
    check_new(out)
    if stream and push_to:
        from hf_lop.errors import InvalidInputError

        raise InvalidInputError(f"--stream writes a folder only. Leave out --push-to, then: hf upload {push_to} {out}")
    if stream and (device or dtype):
        from hf_lop.errors import InvalidInputError

        raise InvalidInputError("--stream copies files as they are, on the CPU. Leave out --device and --dtype.")
    if stream:
        threading.Thread(target=_warm, args=(Path(model),), daemon=True).start()
    from hf_lop.planning.show import groups
    from hf_lop.pruner.pruner import LOPPruner
    from hf_lop.recovery.choose import RECOVERIES
    from hf_lop.units.slice import cut_counts

    loaded = LOPPruner.from_pretrained(pruner)
    note(f"Streaming {model}." if stream else f"Loading {model}.")
    pruned = loaded.prune(
        model,
        ratio,
        params=params,
        memory=memory,
        flops=flops,
        latency=latency,
        round_to=blocks(round_to),
        method=method,
        recover=None if recover == "none" else recover,
        strict=strict,
        output_dir=out if stream else None,
        loading=None if stream else place(device, dtype),
    )
    recovery = pruned.config.pruning_config["recovery"]
    note(f"Recovery: {RECOVERIES[recovery]}." if recovery else "Recovery: none.")
    note(f"Widths are multiples of {pruned.config.pruning_config['round_to']}, unless a layer keeps all that it has.")
    for widths in cut_counts(pruned).values():
        note(groups(widths))
    if not stream:
        pruned.save_pretrained(out)
    report = {"out": str(out), "pruning_config": pruned.config.pruning_config, "parameters": pruned.num_parameters()}
    report |= push(pruned, push_to, private=private, collection=collection)
    show(report, f"Saved {out}: {report['parameters']:,} parameters. Load it with from_pretrained.", as_json)


def _warm(folder: Path) -> None:
    """Let the system fetch the first weights of a folder, while imports take as long as several gigabytes do."""
    # What is wrong with a file is said where it is used; not every system knows how much memory it has.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        left, buffer = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8, bytearray(2**22)
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                while left > 0 and (count := stream.readinto(buffer)):
                    left -= count
