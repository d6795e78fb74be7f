"""The command `fit`."""

from typing import Annotated, Any

import typer

from hf_lop.cli.options import (
    AsJson,
    Collection,
    Device,
    Dtype,
    Out,
    Private,
    PushTo,
    RoundTo,
    blocks,
    check_push,
    place,
    push,
    show,
)


def fit(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    data: Annotated[str, typer.Option(help="A .json, .jsonl, .parquet, .csv or .txt file, or a dataset's Hub id.")],
    out: Out,
    samples: Annotated[int, typer.Option(help="Samples for the activation statistics.")] = 400,
    search_samples: Annotated[int, typer.Option(help="Other samples, on which plans are judged.")] = 400,
    report_samples: Annotated[
        int | None, typer.Option(help="Samples set aside for reports; what is left, at most 400, by default.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="l2, wanda, wifv, wifn, ifv or magnitude.")] = "l2",
    search: Annotated[str, typer.Option(help="additive, mcts or cmaes.")] = "additive",
    reward: Annotated[str, typer.Option(help="divergence, log_likelihood, accuracy or perplexity.")] = "divergence",
    evaluations: Annotated[int, typer.Option(help="Candidates that a search evaluates per target.")] = 200,
    predictor: Annotated[str, typer.Option(help="transformer, bilstm or mlp.")] = "transformer",
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens at which plain texts are cut.")] = None,
    sketch_rows: Annotated[int, typer.Option(help="Size of the sketch for recovery without data; 0 for none.")] = 128,
    recover: Annotated[
        str, typer.Option(help="Judge candidates as prune leaves them after this: sketch, or none.")
    ] = "none",
    round_to: RoundTo = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the draw of samples, the search and the predictor.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the journal of a killed run.")] = False,
    push_to: PushTo = None,
    private: Private = False,
    collection: Collection = None,
    as_json: AsJson = False,
) -> None:
    """Make a pruner for a model from data like that it shall work on.

    Several processes share the work and give the same pruner: accelerate launch --multi_gpu --num_processes 2 -m hf_lop
    fit ..., or torchrun --nproc_per_node 2 -m hf_lop fit ...; without GPUs both run on the CPU.
    """
    check_push(push_to, collection)
    from hf_lop.hub.write.whole import check_new
    from hf_lop.learning.processes import launched

    processes, journal = launched(), out.with_name(out.name + ".journal")

    def check() -> None:
        check_new(out)
        if not resume:
            check_new(journal)

    processes.from_main(check)
    from hf_lop.pruner.pruner import LOPPruner

    fitted = LOPPruner.fit(
        model,
        data,
        samples=samples,
        search_samples=search_samples,
        report_samples=report_samples,
        batch_size=batch_size,
        max_length=max_length,
        criterion=criterion,
        search=search,
        reward=reward,
        evaluations=evaluations,
        predictor=predictor,
        sketch_rows=sketch_rows,
        recover=None if recover == "none" else recover,
        round_to=blocks(round_to),
        seed=seed,
        journal=journal,
        loading=place(device, dtype),
    )
    if not processes.main:
        return
    fitted.save_pretrained(out)
    report: dict[str, Any] = {"out": str(out), "journal": str(journal), "loss": fitted.config.predictor_loss}
    report |= push(fitted, push_to, private=private, collection=collection)
    show(report, f"Saved {out}. Its probes and evaluations are in {journal}.", as_json)
