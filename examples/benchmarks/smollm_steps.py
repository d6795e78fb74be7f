"""The steps of smollm.py: what is measured of one seed, and when."""

import copy
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import Clock, Steps

from hf_lop.learning.bench import Bench
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.predictors import build_predictor, train_predictor
from hf_lop.learning.probes import probe_layers
from hf_lop.learning.rewards import Reward
from hf_lop.learning.statistics import collect_statistics
from hf_lop.planning.additive import additive_plans
from hf_lop.planning.baselines import global_threshold
from hf_lop.planning.journal import Journal
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from hf_lop.planning.table import learn_table, training_pairs
from hf_lop.recovery.by_layer import recover_lstsq, set_output_weights
from hf_lop.recovery.moments import second_moments
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import prunable_units, slice_units
from hf_lop.units.views import ElasticModel

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
TOKENS = smollm.TOKENS
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


class Run(Steps):
    """One seed."""

    def __init__(self, folder: Path, seed: int, data: Path | None) -> None:
        super().__init__(folder, seed)
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
        self.units = prunable_units(self.model)
        self.size = measure_size(self.model, self.units)
        self.widths = self.size.widths
        self._elastic: dict[str, ElasticModel] = {}
        self.on(self.fingerprints)

    # -- What the methods know -----------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> Any:
        """Activation statistics; computed anew by every run, as they take seconds."""
        with Clock() as clock:
            found = collect_statistics(self.model, batches(self.blocks["calibration"]), self.units)
        self.kept("calibration", lambda: {"seconds": clock.seconds})
        return found

    def scores(self, criterion: str) -> list[torch.Tensor]:
        """Score all neurons."""
        return unit_importance(self.model, self.units, criterion, self.statistics)

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
                found = probe_layers(Bench(self.model, order, batches(self.blocks["probe"])), PROBES)[0]
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
            found.append(loss.view(-1, TOKENS - 1).double().mean(1).numpy())
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
                weights = recover_lstsq(self.model, self.units, kept, self.moments)
                pruned = copy.deepcopy(self.model)
                set_output_weights(pruned, slice_units(pruned, kept), weights)
            return plan | self.above_dense(pruned) | {"recovery": clock.seconds}

        return self.kept(f"recovered-{method.replace(' ', '-')}-{target:g}", measure)  # type: ignore[no-any-return]

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """Second moments of all layers on the calibration blocks."""
        with Clock() as clock:
            found = list(second_moments(self.model, batches(self.blocks["calibration"]), self.units))
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
