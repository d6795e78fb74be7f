"""The command `hf-lop evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lop.errors import EvaluationError, InvalidInputError

if TYPE_CHECKING:
    from hf_lop.evaluation.results import Results


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder, dense or pruned.")],
    tasks: Annotated[str, typer.Option(help="Task names with commas; lop-paper is the paper's four benchmarks.")],
    pruner: Annotated[str | None, typer.Option(help="Pruner to cut the model with first; needs --ratio.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of all FFN neurons to remove, in [0, 1).")] = None,
    harness: Annotated[
        str | None, typer.Option(help="lmms-eval or lm-eval; by default where the task is known.")
    ] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="Folder with task files, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task, for tests.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps answers; the same call resumes there.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto for that of the checkpoint.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model code of the repository.")
    ] = False,
    dense: Annotated[
        Path | None, typer.Option(help="File that --out wrote for the dense model, to compare with.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for results and answers (JSON).")] = None,
    push_results: Annotated[str | None, typer.Option(help="Hub repository whose card gets the results.")] = None,
    eval_results: Annotated[
        list[str] | None,
        typer.Option(help="METRIC=DATASET:TASK to write as .eval_results file as well, repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")] = False,
) -> None:
    """Run benchmarks of lmms-eval and lm-eval on a dense or pruned model."""
    benchmarks = _benchmarks(eval_results or [])
    if benchmarks and push_results is None:
        raise InvalidInputError("--eval-results says what to push, but not where to. Add --push-results REPO.")
    if pruner is not None and push_results == model:
        raise InvalidInputError(
            f"The results are of a pruned model, and {model} is the dense one. Push them to its own repository, or to the pruner's."
        )
    from hf_lop.evaluation.results import Results
    from hf_lop.evaluation.run import evaluate as run
    from hf_lop.hub.write.whole import check_makeable

    if out is not None:
        check_makeable(out.parent)  # a benchmark may take hours

    reference = None if dense is None else Results.load(dense)
    failure: EvaluationError | None = None
    try:
        results = run(
            model,
            tasks,
            pruner=pruner,
            ratio=ratio,
            harness=harness,
            include_path=include_path or (),
            limit=limit,
            batch_size=batch_size,
            cache=cache,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    except EvaluationError as error:
        if error.results is None:
            raise
        results, failure = error.results, error
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if out is not None:
        results.save(out)
        typer.echo(f"Wrote {out}.", err=True)
    typer.echo(json.dumps(_plain(results, reference), indent=2) if as_json else _text(results, reference))
    if failure is not None:
        raise failure
    if push_results is not None:
        from hf_lop.evaluation.card import push_results as push

        done = push(results, push_results, dense=reference, benchmarks=benchmarks)
        typer.echo(f"Pushed the results: {done.commit_url}", err=True)


def _benchmarks(given: list[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for each in given:
        metric, equals, where = each.partition("=")
        dataset, colon, task = where.rpartition(":")
        if not (equals and colon and metric and dataset and task):
            raise InvalidInputError(
                f"--eval-results is {each!r}; write METRIC=DATASET:TASK, such as acc=org/set:default."
            )
        found[metric] = (dataset, task)
    return found


def _plain(results: "Results", dense: "Results | None") -> dict[str, Any]:
    from dataclasses import asdict

    from hf_lop.evaluation.paper import PaperScores, has_all

    plain = results.to_dict()
    if has_all(results):
        scores = PaperScores.of(results)
        plain["paper"] = {**asdict(scores), "average": scores.average}
        if dense is not None and has_all(dense):
            plain["paper"]["drop"] = scores.drop(PaperScores.of(dense))
    return plain


def _text(results: "Results", dense: "Results | None") -> str:
    from hf_lop.evaluation.paper import PaperScores, has_all, paper_table

    text = str(results)
    if has_all(results):
        reference = PaperScores.of(dense) if dense is not None and has_all(dense) else None
        rows = {} if reference is None else {"dense": reference}
        cut = f", {results.pruning['ratio']:.0%} of the neurons removed" if results.pruning else ""
        text += "\n\n" + paper_table({**rows, results.model + cut: PaperScores.of(results)}, reference)
    return text
