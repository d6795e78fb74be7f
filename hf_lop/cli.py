"""The command line: `hf-lop`. Data goes to stdout, progress and messages to stderr."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lop import __version__
from hf_lop.evaluation.command import evaluate

if TYPE_CHECKING:
    from hf_lop.plan import Plan

app = typer.Typer(
    name="hf-lop",
    help="Learned pruning of multimodal LLMs: any size from one Hub repository.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
Ratio = Annotated[float | None, typer.Option(help="Fraction of all FFN neurons to remove, in [0, 1).")]
Params = Annotated[float | None, typer.Option(help="Parameters the whole model may have, e.g. 6e9.")]
Memory = Annotated[str | None, typer.Option(help="Bytes its parameters may take, e.g. 6GB or 5.5GiB.")]
Flops = Annotated[float | None, typer.Option(help="FLOPs its text decoder may need per token.")]
Latency = Annotated[float | None, typer.Option(help="Seconds all FFNs may take per token on this device.")]
RoundTo = Annotated[int, typer.Option(help="Widths are multiples of this.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")]
PushTo = Annotated[str | None, typer.Option(help="Hub repository to push to as well.")]
Private = Annotated[bool, typer.Option("--private", help="Make the pushed repository private.")]


def _show(data: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text)


def _note(message: str) -> None:
    typer.echo(message, err=True)


def _new_folder(folder: Path) -> None:
    from hf_lop.errors import InvalidInputError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{folder} exists and is not empty. Choose a new folder, or remove it first.")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def quickstart(
    ratio: Annotated[float, typer.Option(help="Fraction of all FFN neurons to remove, in [0, 1).")] = 0.3,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and the plot.")] = Path("lop-quickstart"),
    as_json: AsJson = False,
) -> None:
    """Prune the embedded demo model, reload it without hf_lop, and compare it with the dense one."""
    from hf_lop.demo.quickstart import run

    report = run(ratio, out)
    _show(report.to_dict(), str(report), as_json)


@app.command()
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
    _show(found.to_dict(), "\n".join(lines), as_json)


@app.command()
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
        _note(f"Wrote {plot}.")
    _show(made.to_dict(), str(made), as_json)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense model.")],
    pruner: Annotated[str, typer.Option(help="Hub id or folder of its pruner.")],
    out: Out,
    ratio: Ratio = None,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    latency: Latency = None,
    round_to: RoundTo = 1,
    method: Annotated[
        str,
        typer.Option(
            help="lop (predicted); table, additive, mcts, cmaes (searched); uniform, magnitude, wanda, flap."
        ),
    ] = "lop",
    recover: Annotated[
        str,
        typer.Option(
            help="What lets the kept neurons do the removed ones' work: sketch (least squares without data), fold (their "
            "mean), bias (FLAP's, adds parameters), none, or auto: sketch where the pruner has one."
        ),
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse another commit of the base model.")] = False,
    push_to: PushTo = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model to a budget and save it, ready for from_pretrained; push it if asked to."""
    _new_folder(out)
    from hf_lop.pruner import LOPPruner
    from hf_lop.recoveries import RECOVERIES

    loaded = LOPPruner.from_pretrained(pruner)
    _note(f"Loading {model}.")
    pruned = loaded.prune(
        model,
        ratio,
        params=params,
        memory=memory,
        flops=flops,
        latency=latency,
        round_to=round_to,
        method=method,
        recover=None if recover == "none" else recover,
        strict=strict,
    )
    recovery = pruned.config.pruning_config["recovery"]
    _note(f"Recovery: {RECOVERIES[recovery]}." if recovery else "Recovery: none.")
    pruned.save_pretrained(out)
    report = {"out": str(out), "pruning_config": pruned.config.pruning_config, "parameters": pruned.num_parameters()}
    if push_to:
        report["pushed_to"] = str(pruned.push_to_hub(push_to, private=private))
    _show(report, f"Saved {out}: {report['parameters']:,} parameters. Load it with from_pretrained.", as_json)


@app.command()
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
    seed: Annotated[int, typer.Option(help="Seed of the draw of samples, the search and the predictor.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the journal of a killed run.")] = False,
    push_to: PushTo = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Make a pruner for a model from data like that it shall work on.

    Several processes share the work and give the same pruner: accelerate launch --multi_gpu --num_processes 2 -m hf_lop
    fit ..., or torchrun --nproc_per_node 2 -m hf_lop fit ...; without GPUs both run on the CPU.
    """
    from hf_lop.processes import launched

    processes, journal = launched(), out.with_name(out.name + ".journal")

    def check() -> None:
        _new_folder(out)
        if not resume:
            _new_folder(journal)

    processes.from_main(check)
    from hf_lop.pruner import LOPPruner

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
        seed=seed,
        journal=journal,
    )
    if not processes.main:
        return
    fitted.save_pretrained(out)
    report: dict[str, Any] = {"out": str(out), "journal": str(journal), "loss": fitted.config.predictor_loss}
    if push_to:
        report["pushed_to"] = str(fitted.push_to_hub(push_to, private=private))
    _show(report, f"Saved {out}. Its probes and evaluations are in {journal}.", as_json)


@app.command()
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
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens at which plain texts are cut.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare all methods at the same ratios on data that no method has seen: a table and plots."""
    from hf_lop.compare import check_arguments, fit_pruners
    from hf_lop.compare import compare as run_comparison
    from hf_lop.data import model_batches, read_rows, split_rows
    from hf_lop.errors import InvalidInputError
    from hf_lop.hub.loading import load_model, load_processor
    from hf_lop.methods import METHODS
    from hf_lop.processes import launched

    ratios, searches = ratio or [0.2, 0.3, 0.5, 0.7], list(dict.fromkeys(search or ["additive"]))
    rewards, recoveries = reward or ["perplexity"], (None, "lstsq") if recover else (None,)
    check_arguments(range(seeds), ratios, method or list(METHODS), recoveries, rewards, [data])
    if absent := {"mcts", "cmaes"} & {*(method or ())} - {*searches}:
        raise InvalidInputError(f"Method {min(absent)} needs its search. Add --search {min(absent)}, or leave it out.")
    rows = read_rows(data)
    # The report is drawn first, so that it is the same whatever the seeds and their samples are.
    report, *parts = split_rows(rows, [report_samples] + [samples, search_samples] * seeds)
    processor, dense = load_processor(model), load_model(model)

    def batches(part: list[Any]) -> list[dict[str, Any]]:
        return list(model_batches(processor, part, batch_size=batch_size, max_length=max_length))

    draws = [(batches(parts[2 * seed]), batches(parts[2 * seed + 1])) for seed in range(seeds)]
    pruners = fit_pruners(dense, draws, searches, out, evaluations=evaluations)
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
        folder=out,
    )
    written = result.save(out, {name: sorted(out.glob(f"fit-*-{name}")) for name in searches})
    _note("Wrote " + ", ".join(str(path) for path in written) + ".")
    _show(json.loads(result.to_json()), result.to_markdown(), as_json)


app.command()(evaluate)


@app.command("train-predictor")
def train_predictor(
    pruner: Annotated[str, typer.Argument(help="Hub id or folder of a pruner.")],
    out: Out,
    predictor: Annotated[str, typer.Option(help="transformer, bilstm or mlp.")] = "transformer",
    table: Annotated[
        Path | None, typer.Option(help='JSON list of {"ratio": R, "ratios": [one per layer]} to train on instead.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and training order.")] = 0,
    push_to: PushTo = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Train a pruner's predictor anew, on its own table of (R, layer ratios) pairs or on another."""
    _new_folder(out)
    from hf_lop.fitting import read_table
    from hf_lop.pruner import LOPPruner

    loaded = LOPPruner.from_pretrained(pruner)
    losses = loaded.train_predictor(predictor, table=read_table(table) if table else None, seed=seed, progress=True)
    loaded.save_pretrained(out)
    report: dict[str, Any] = {"out": str(out), "predictor": predictor, "epochs": len(losses), "loss": losses[-1]}
    if push_to:
        report["pushed_to"] = str(loaded.push_to_hub(push_to, private=private))
    _show(
        report, f"Saved {out}: {predictor}, mean squared error {losses[-1]:.2e} after {len(losses)} epochs.", as_json
    )


def main() -> None:
    """Run the command line; an error the user can mend is one line on stderr and exit code 1."""
    from hf_lop.modeling_lop import LOPError

    try:
        app()
    except (LOPError, OSError) as error:
        _note(f"Error: {error}")
        sys.exit(1)
