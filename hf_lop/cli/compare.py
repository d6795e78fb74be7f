"""The command `compare`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lop.cli.options import AsJson, Device, Dtype, RoundTo, blocks, note, place, show


def compare(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    data: Annotated[str, typer.Option(help="A .json, .jsonl, .parquet, .csv or .txt file, or a dataset's Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for table, rows and plots; the same call goes on there.")],
    ratio: Annotated[list[float] | None, typer.Option(help="Target ratio, repeatable; 0.2, 0.3, 0.5, 0.7.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method, repeatable; by default all that the searches give.")
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Also with least squares on the calibration data.")
    ] = False,
    reward: Annotated[list[str] | None, typer.Option(help="What to measure, repeatable; perplexity.")] = None,
    seeds: Annotated[int, typer.Option(help="Pruners to fit, each on its own draw of the data.")] = 3,
    samples: Annotated[int, typer.Option(help="Samples for the activation statistics, per seed.")] = 200,
    search_samples: Annotated[int, typer.Option(help="Samples on which plans are judged, per seed.")] = 200,
    report_samples: Annotated[int, typer.Option(help="Samples of the report, never used for anything else.")] = 200,
    search: Annotated[
        list[str] | None,
        typer.Option(help="additive, mcts or cmaes, repeatable; LOP's predictor learns from the first. additive."),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Candidates that a search evaluates per target.")] = 200,
    round_to: RoundTo = "auto",
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens at which plain texts are cut.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare all methods at the same ratios on data that no method has seen: a table and plots."""
    from hf_lop.errors import InvalidInputError
    from hf_lop.evaluation.comparison.compare import check_arguments
    from hf_lop.evaluation.comparison.compare import compare as run_comparison
    from hf_lop.evaluation.comparison.fit import fit_pruners
    from hf_lop.hub.read.load import load_model, load_processor
    from hf_lop.hub.write.whole import check_makeable
    from hf_lop.learning.data import model_batches, read_rows, split_rows
    from hf_lop.learning.processes import launched
    from hf_lop.pruner.methods import METHODS

    ratios, searches = ratio or [0.2, 0.3, 0.5, 0.7], list(dict.fromkeys(search or ["additive"]))
    rewards, recoveries = reward or ["perplexity"], (None, "lstsq") if recover else (None,)
    check_arguments(range(seeds), ratios, method or list(METHODS), recoveries, rewards, [data])
    if absent := {"mcts", "cmaes"} & {*(method or ())} - {*searches}:
        raise InvalidInputError(f"Method {min(absent)} needs its search. Add --search {min(absent)}, or leave it out.")
    check_makeable(out)
    rows = read_rows(data)
    # The report is drawn first, so that it is the same whatever the seeds and their samples are.
    report, *parts = split_rows(rows, [report_samples] + [samples, search_samples] * seeds)
    processor, dense = load_processor(model), load_model(model, **place(device, dtype))

    def batches(part: list[Any]) -> list[dict[str, Any]]:
        return list(model_batches(processor, part, batch_size=batch_size, max_length=max_length))

    draws = [(batches(parts[2 * seed]), batches(parts[2 * seed + 1])) for seed in range(seeds)]
    pruners = fit_pruners(dense, draws, searches, out, evaluations=evaluations, round_to=blocks(round_to))
    if not launched().main:
        return  # only fitting is shared
    result = run_comparison(
        pruners,
        dense,
        batches(report),
        ratios=ratios,
        methods=method,
        recover=recoveries,
        data=draws[0][0] if recover else None,
        rewards=rewards,
        round_to=blocks(round_to),
        folder=out,
    )
    written = result.save(out, {name: sorted(out.glob(f"fit-*-{name}")) for name in searches})
    note("Wrote " + ", ".join(str(path) for path in written) + ".")
    show(json.loads(result.to_json()), result.to_markdown(), as_json)
