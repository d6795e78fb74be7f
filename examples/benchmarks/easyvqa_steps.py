"""The steps of easyvqa.py: what is measured of one seed, and when."""

import copy
import gc
import sys
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import Clock, Steps

from hf_lop import LOPPruner
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.rewards import Reward
from hf_lop.learning.statistics import collect_statistics
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from hf_lop.pruner.methods import choose
from hf_lop.recovery.by_layer import recover_lstsq, set_output_weights
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.moments import second_moments
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import prunable_units, slice_units

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "beds"))
import easyvqa
import smollm
from easyvqa_data import KINDS as KINDS
from easyvqa_data import fingerprint, load_groups, load_questions

TARGETS = (0.2, 0.3, 0.5, 0.7)
TABLE = (0.1, 0.25, 0.4, 0.6, 0.75)
CRITERIA = ("l2", "wifn", "wifv", "ifv")
CHOOSING = (0.2, 0.3)
QUESTIONS = {"calibration": 300, "recovery": 600}  # the first ones of the recovery are those of the calibration
PICTURES = {"search": 10, "report": 40}
PROSE = 4  # blocks
TOKENS = smollm.TOKENS
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
RECOVERIES = (None, "lstsq", "sequential")
IN_TURN = {"methods": ("wanda", "flap", "uniform", "lop"), "targets": (0.5, 0.7)}


class Run(Steps):
    """One seed."""

    def __init__(self, folder: Path, seed: int, data: Path | None) -> None:
        super().__init__(folder, seed)
        self.model, self.processor = easyvqa.load_model()
        self.units = prunable_units(self.model)
        self.size = measure_size(self.model, self.units)
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
        self.on({name: fingerprint(asked) for name, asked in self.questions.items()})

    # -- What the methods know -----------------------------------------------------------------------------------------

    def criterion(self) -> dict[str, Any]:
        """Choose the criterion by uniform plans on search pictures."""

        def measure() -> dict[str, Any]:
            found = {}
            with Clock() as clock:
                statistics = collect_statistics(self.model, self.batches["calibration"], self.units)
                for name in CRITERIA:
                    order = neuron_order(unit_importance(self.model, self.units, name, statistics))
                    reward = Reward.on(self.model, order, self.batches["search"], "divergence")
                    cuts = [[round(unit.count * (1 - target)) for unit in self.units] for target in CHOOSING]
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
            starts = [self.pruners["additive"].look_up(target), np.full(len(self.units), target)]
            with Clock() as clock:
                found = run_search(ENGINES[engine](space, starts, seed=self.seed), worth, EVALUATIONS["direct"])
            return {"ratios": list(found.ratios), "reward": found.reward, "cpu": clock.seconds}

        return self.kept(f"{engine}-{target:g}", measure)  # type: ignore[no-any-return]

    # -- Plans ---------------------------------------------------------------------------------------------------------

    def plan(self, method: str, target: float) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Return the kept neurons of every layer, and what a plan for one more target cost."""
        name = {"additive": "table", "mcts": "uniform", "cmaes": "uniform"}.get(method, method)
        fill, order = choose(name, self.pruners["cmaes" if method == "lop" else "additive"], self.model, self.units)
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
            found = list(second_moments(self.model, self.batches["recovery"], self.units))
        self.kept("moments", lambda: clock.seconds)
        return found

    def report(self, method: str, target: float, recovery: str | None) -> dict[str, Any]:
        """Prune a copy, with or without least squares, and judge it."""

        def measure() -> dict[str, Any]:
            kept, plan = self.plan(method, target)
            pruned = copy.deepcopy(self.model)
            moments = self.moments if recovery == "lstsq" else []
            outputs = None
            with Clock() as clock:
                if recovery == "lstsq":
                    outputs = recover_lstsq(self.model, self.units, kept, moments)
                elif recovery == "sequential":
                    outputs = recover_in_turn(self.model, self.batches["recovery"], self.units, kept)
                cut = slice_units(pruned, kept)
                if outputs is not None:
                    set_output_weights(pruned, cut, outputs)
            found = plan | self.judge(pruned) | {"cut": clock.seconds}
            del pruned, cut
            gc.collect()  # a copy of the model is tied in circles, which would stay for many rows
            return found

        return self.kept(f"report-{method}-{target:g}-{recovery or 'none'}", measure)  # type: ignore[no-any-return]
