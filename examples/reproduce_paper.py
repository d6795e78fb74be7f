"""Tables 1 to 3 of LOP (arXiv 2506.12826): fit, prune, evaluate, and print our numbers beside the published ones.

    python examples/reproduce_paper.py --work lop-7b --batch-size 8           # Qwen2.5-VL-7B: needs a GPU and the Hub
    python examples/reproduce_paper.py --work lop-demo --demo                 # the embedded demo, minutes on a CPU

The same call goes on where a stopped run was: the search has its journal, every finished model its file in WORK/results, and
the answers to single questions are kept as well. The real run was never made by us: there was no GPU.

As in the paper, the importance of neurons and the reward of the search come from MMBench, on which Table 1 then reports; only
the samples of calibration and search are kept apart. With --data they come from elsewhere. Methods use the stored statistics
of one calibration pass, nothing is recovered after the cut, and FLAP is without its bias.

The demo answers one word about drawn pictures and knows neither letters nor yes and no, so its tables show that everything
runs, not how good the method is: see examples/evaluate_demo.py for that.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_lop import LOPPruner, demo, evaluate
from hf_lop.evaluation.paper import HEADINGS, NAME, PaperScores
from hf_lop.evaluation.results import Results
from hf_lop.hub.read.load import load_model, load_processor
from hf_lop.learning.data import model_batches, read_rows, split_rows

MMBENCH = "mmbench_en_dev_static"
RATIOS = (0.2, 0.3, 0.5)
METHODS = ("magnitude", "wanda", "flap", "lop")
PREDICTORS = ("transformer", "bilstm", "mlp")
# As published: MME-P, MME-R, MMBench, MMMU, POPE. Magnitude at 50 % "loses language generation" there.
TABLE_1 = {
    ("dense", 0.0): (1694.39, 640.36, 86.88, 51.29, 87.48),
    ("magnitude", 0.2): (1397.55, 327.86, 78.05, 38.55, 83.76),
    ("wanda", 0.2): (1643.19, 554.64, 84.52, 43.69, 88.22),
    ("flap", 0.2): (1651.26, 568.57, 84.78, 42.64, 87.67),
    ("lop", 0.2): (1631.15, 605.00, 86.02, 46.03, 88.07),
    ("magnitude", 0.3): (1397.55, 327.86, 58.33, 25.70, 51.41),
    ("wanda", 0.3): (1542.28, 429.64, 81.59, 43.11, 88.38),
    ("flap", 0.3): (1537.39, 534.64, 82.12, 41.24, 87.46),
    ("lop", 0.3): (1613.73, 575.00, 85.65, 44.16, 87.83),
    ("wanda", 0.5): (1142.19, 132.86, 58.67, 29.09, 85.91),
    ("flap", 0.5): (1337.49, 356.07, 70.43, 32.83, 87.46),
    ("lop", 0.5): (1478.07, 468.57, 82.17, 35.51, 87.47),
}
TABLE_2 = {
    "Mipha-3B": (69.7, 1783.9),
    "InternVL2.5-4B": (81.6, 1939.2),
    "MoE-LLaVA-2.7Bx4": (68.0, 1431.3),
    "LOP 60%": (80.0, 1773.1),
    "LOP 50%": (82.2, 1946.6),
}
TABLE_3 = {
    ("transformer", 0.5): 82.17, ("transformer", 0.3): 85.65, ("transformer", 0.2): 86.02,
    ("bilstm", 0.5): 81.68, ("bilstm", 0.3): 85.54, ("bilstm", 0.2): 85.79,
    ("mlp", 0.5): 82.10, ("mlp", 0.3): 85.59, ("mlp", 0.2): 85.84,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """Read the command line; the demo brings its own model, data and stand-ins for the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--demo", action="store_true", help="run on the embedded demo model")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct")
    parser.add_argument("--data", help="file or dataset with image, question, answer, instead of MMBench")
    parser.add_argument("--samples", type=int, default=500, help="for the importance of neurons")
    parser.add_argument("--search-samples", type=int, default=500, help="for the reward")
    parser.add_argument("--search", default="mcts", help="mcts, cmaes or additive")
    parser.add_argument("--reward", default="accuracy", help="see LOPPruner.fit")
    parser.add_argument("--evaluations", type=int, default=200, help="candidates per target")
    parser.add_argument("--targets", type=float, nargs="+", help="0.1 to 0.7 in steps of 0.025 by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default=None, help="the GPU if there is one")
    parser.add_argument("--pictures", type=int, default=12, help="of the demo's benchmarks")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.tasks = []
    given.dtype = "auto"
    if given.demo:
        from demo_benchmarks import write_benchmarks

        given.model, given.dtype = str(demo.MODEL_DIR), "float32"
        given.data = str(given.work / "questions.parquet")
        given.samples, given.search_samples = min(given.samples, 96), min(given.search_samples, 96)
        given.tasks = [write_benchmarks(given.work / "tasks", given.pictures)]
        demo.load_data("calibration").to_parquet(given.data)
    return given


def mmbench_chats(folders: list[Path]) -> list[list[dict[str, Any]]]:
    """Return MMBench's questions as lmms-eval asks them, with their answers."""
    from lmms_eval.protocol import ChatMessages
    from lmms_eval.tasks import get_task_dict

    from hf_lop.evaluation.harnesses import task_manager

    manager = task_manager("lmms-eval", [MMBENCH], [str(folder) for folder in folders])
    task = get_task_dict([MMBENCH], manager, "chat")[MMBENCH]
    chats = []
    for row in task.test_docs():
        chat = ChatMessages(messages=task.doc_to_messages(row)).to_hf_messages()
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        chats.append([*chat, answer])
    return chats


def fitted(given: argparse.Namespace) -> LOPPruner:
    """Return the pruner, fitted now or before."""
    folder = given.work / "pruner"
    if not (folder / "config.json").is_file():
        rows = read_rows(given.data) if given.data else mmbench_chats(given.tasks)
        model = load_model(given.model, dtype=given.dtype, device_map=device(given))
        processor = load_processor(given.model)
        batches = [
            list(model_batches(processor, part, batch_size=given.batch_size))
            for part in split_rows(rows, (given.samples, given.search_samples))
        ]
        LOPPruner.fit(
            model,
            *batches,
            search=given.search,
            reward=given.reward,
            evaluations=given.evaluations,
            targets=given.targets,
            journal=given.work / "journal",
            base_model=None if given.demo else given.model,
            provenance={"dataset": Path(given.data or MMBENCH).name, "samples": given.samples},
        ).save_pretrained(folder)
    return LOPPruner.from_pretrained(folder)


def device(given: argparse.Namespace) -> str:
    """Return where models go."""
    import torch

    return given.device or ("cuda" if torch.cuda.is_available() else "cpu")


def measured(
    given: argparse.Namespace, name: str, pruner: LOPPruner | None, ratio: float, method: str, tasks: str
) -> Results:
    """Return the results of one model, measured now or before; the seconds of the cut go to WORK/results/NAME.seconds."""
    file = given.work / "results" / f"{name}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        model = load_model(given.model, dtype=given.dtype, device_map=device(given))
        start = time.perf_counter()
        if pruner is not None:
            pruner.prune(model, ratio, method=method, recover=None)
        seconds = time.perf_counter() - start
        found = evaluate(
            model, tasks, include_path=given.tasks, batch_size=given.batch_size, cache=given.work / "answers"
        )
        file.with_suffix(".seconds").write_text(f"{seconds:.3f}")
        found.save(file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)  # a file is whole, or it is not there
        print(f"{name} done", file=sys.stderr)
    return Results.load(file)


def ours_and_theirs(own: float, published: float | None) -> str:
    """Print two numbers in one cell."""
    return f"{own:.2f} ({'-' if published is None else f'{published:.2f}'})"


def table_1(given: argparse.Namespace, pruner: LOPPruner) -> Iterator[str]:
    """Baselines and LOP at three ratios."""
    yield "## Table 1: ours (published)\n"
    yield (
        f"| neurons removed | parameters removed | method | {' | '.join(HEADINGS)} | Avg | drop | cut, s |\n|---|---:|---|"
        + "---:|" * 8
    )
    dense = measured(given, "dense", None, 0.0, "dense", NAME)
    rows = [("dense", 0.0, "dense")] + [(f"{m}-{r}", r, m) for r in RATIOS for m in METHODS]
    for name, ratio, method in rows:
        results = dense if method == "dense" else measured(given, name, pruner, ratio, method, NAME)
        own, theirs = PaperScores.of(results), TABLE_1.get((method, ratio))
        values = [own.mme_perception, own.mme_cognition, own.mmbench, own.mmmu, own.pope]
        cells = [ours_and_theirs(v, None if theirs is None else theirs[i]) for i, v in enumerate(values)]
        published = None if theirs is None else PaperScores(*theirs)
        cells.append(ours_and_theirs(own.average, None if published is None else published.average))
        reference = PaperScores(*TABLE_1["dense", 0.0])
        lost = own.drop(PaperScores.of(dense)).get("average", 0.0)
        told = "-" if published is None else f"{published.drop(reference)['average']:.1%}"
        cells.append(f"{lost:.1%} ({told})")
        seconds = (given.work / "results" / f"{name}.seconds").read_text()
        removed = 1 - results.parameters / dense.parameters
        yield f"| {ratio:.0%} | {removed:.1%} | {method} | {' | '.join(cells)} | {'' if method == 'dense' else seconds} |"


def table_2(given: argparse.Namespace, pruner: LOPPruner) -> Iterator[str]:
    """LOP against other models of its size."""
    yield "\n## Table 2: MMBench and MME, ours (published)\n\n| model | MMBench | MME |\n|---|---:|---:|"
    own = {f"LOP {r:.0%}": PaperScores.of(measured(given, f"lop-{r}", pruner, r, "lop", NAME)) for r in (0.6, 0.5)}
    for model, (mmbench, mme) in TABLE_2.items():
        if scores := own.get(model):
            both = scores.mme_perception + scores.mme_cognition
            yield f"| {model} | {ours_and_theirs(scores.mmbench, mmbench)} | {ours_and_theirs(both, mme)} |"
        else:
            yield f"| {model} | - ({mmbench}) | - ({mme}) |"


def table_3(given: argparse.Namespace, pruner: LOPPruner) -> Iterator[str]:
    """Predictors, trained on the same plans."""
    yield "\n## Table 3: MMBench by predictor, ours (published)\n\n| predictor | 50% | 30% | 20% |\n|---|---:|---:|---:|"
    for predictor in PREDICTORS:
        if predictor != "transformer":
            pruner.train_predictor(predictor)
        cells = []
        for ratio in (0.5, 0.3, 0.2):
            name = f"lop-{ratio}" if predictor == "transformer" else f"{predictor}-{ratio}"
            score = measured(given, name, pruner, ratio, "lop", MMBENCH)[MMBENCH].metrics["gpt_eval_score"]
            cells.append(ours_and_theirs(score, TABLE_3[predictor, ratio]))
        yield f"| {predictor} | {' | '.join(cells)} |"


def main() -> None:
    """Make all that is missing, and print the tables."""
    given = arguments()
    pruner = fitted(given)
    source = given.data or "MMBench, as in the paper: its scores flatter every method that uses data"
    name = "The embedded demo" if given.demo else given.model
    lines = [f"# {name}", f"Calibration and search: {Path(source).name}. Published numbers: Qwen2.5-VL-7B.", ""]
    for table in (table_1, table_2, table_3):
        lines += table(given, pruner)
    text = "\n".join(lines)
    (given.work / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
