"""What the search engines find on a synthetic landscape of 28 layers: a Markdown table.

    python examples/benchmarks/search_engines.py > examples/benchmarks/results/search_engines.md
    python examples/benchmarks/search_engines.py --settings --seeds 8 > examples/benchmarks/results/search_settings.md

Accuracy is 0.85 exp(-3 damage), damage = mean(s r^3) + 0.15 r W r / 28. The sensitivities s are log-normal, those of
the first three layers times 4 and of the last two times 3, scaled so that the uniform plan has 58 % at ratio 0.5; W is
positive semi-definite and couples neighbouring layers with random sign. A search sees the accuracy itself, or,
"noisy", the share of 500 questions answered rightly. It evaluates 200 candidates; the table has the true accuracy of
the one it returns, mean and standard error over seeds, each with a landscape of its own. --settings varies one setting
of MCTS and CMA-ES at a time, on other seeds: the defaults come from there. A real model may rank the engines
otherwise.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lop.planning.additive import additive_plans
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import Search, run_search
from hf_lop.planning.search.space import SearchSpace

LAYERS, WIDTHS = 28, (18944,) * 28
PROBES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
TARGETS = (0.3, 0.5)
Floats = NDArray[np.float64]
Make = Callable[..., Search]


class Landscape:
    """A synthetic model: what accuracy layer ratios `[28] float64` leave."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sensitivity = rng.lognormal(0, 0.7, LAYERS)
        sensitivity[:3] *= 4
        sensitivity[-2:] *= 3
        strength = rng.normal(0, 0.5, LAYERS)
        distance = np.abs(np.subtract.outer(np.arange(LAYERS), np.arange(LAYERS)))
        self.coupling = 0.15 / LAYERS * np.outer(strength, strength) * np.exp(-distance)
        half = np.full(LAYERS, 0.5)
        wanted = np.log(0.85 / 0.58) / 3 - half @ self.coupling @ half
        self.sensitivity = sensitivity * wanted / np.mean(sensitivity * half**3)

    def damage(self, ratios: Floats) -> float:
        """Return the damage, 0 for the dense model."""
        return float(np.mean(self.sensitivity * ratios**3) + ratios @ self.coupling @ ratios)

    def accuracy(self, ratios: Floats) -> float:
        """Return the accuracy in [0, 0.85]."""
        return float(0.85 * np.exp(-3 * self.damage(ratios)))

    def noisy(self, seed: int) -> Callable[[Floats], float]:
        """Return a reward that measures the accuracy on 500 random questions."""
        rng = np.random.default_rng(seed)
        return lambda ratios: float(rng.binomial(500, self.accuracy(ratios)) / 500)

    def additive(self, target: float) -> Floats:
        """Plan from the damage of single layers."""
        damage = [[self.damage(ratio * np.eye(LAYERS)[layer]) for ratio in PROBES] for layer in range(LAYERS)]
        return additive_plans(damage, PROBES, WIDTHS, [target])[0]


class Random(Search):
    """Perturbations of the first start, each independent of all rewards."""

    citation = ""

    def __init__(
        self, space: SearchSpace, starts: Sequence[ArrayLike] = (), *, seed: int, spread: float = 0.3
    ) -> None:
        super().__init__(space, starts, seed=seed)
        self.spread, self.first = spread, True

    def _propose(self) -> Floats:
        noise = self._rng.uniform(-self.spread, self.spread, LAYERS) * (not self.first)
        return self.space.project(np.clip(self.starts[0] + noise, 0, 1))

    def _learn(self, ratios: Floats, reward: float) -> None:
        self.first = False


def found(make: Make, target: float, noisy: bool, from_additive: bool, seeds: range) -> list[float]:
    """Search once per seed: the true accuracies in percent."""
    accuracies = []
    for seed in seeds:
        landscape = Landscape(seed)
        uniform = np.full(LAYERS, target)
        starts = [landscape.additive(target), uniform] if from_additive else [uniform]
        search = make(SearchSpace(WIDTHS, target), starts, seed=seed)
        reward = landscape.noisy(seed + 1000) if noisy else landscape.accuracy
        accuracies.append(100 * landscape.accuracy(np.array(run_search(search, reward, 200).ratios)))
    return accuracies


def show(values: Sequence[float]) -> str:
    """Format mean and standard error."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}"


def compare_engines(seeds: range) -> None:
    """Print what every engine finds."""
    cases = [(target, noisy) for target in TARGETS for noisy in (False, True)]
    print(
        "| method | " + " | ".join(f"{t:.0%} removed{', noisy' if n else ''}" for t, n in cases) + " | ms/candidate |"
    )
    print("|---|" + "---:|" * (len(cases) + 1))
    for name, plan in (("uniform", lambda _, t: np.full(LAYERS, t)), ("additive", Landscape.additive)):
        cells = []
        for target, _ in cases:
            landscapes = [Landscape(seed) for seed in seeds]
            cells.append(show([100 * landscape.accuracy(plan(landscape, target)) for landscape in landscapes]))
        print(f"| {name} | " + " | ".join(cells) + " | |")
    for name, make in (("random", Random), ("MCTS", MCTS), ("CMA-ES", CMAES)):
        for from_additive in (False, True):
            start = time.perf_counter()
            cells = [show(found(make, target, noisy, from_additive, seeds)) for target, noisy in cases]
            each = (time.perf_counter() - start) / len(seeds) / len(cases) / 200
            origin = "additive" if from_additive else "uniform"
            print(f"| {name} from {origin} | " + " | ".join(cells) + f" | {each * 1e3:.2f} |")
            print(f"{name} from {origin} done", file=sys.stderr)
    print(f"\n{len(seeds)} seeds; true accuracy in percent, dense 85.0.")


def vary_settings(seeds: range) -> None:
    """Print what changing one setting at a time does, averaged over both targets."""
    varied: list[tuple[str, Make, dict[str, Sequence[float]]]] = [
        (
            "MCTS",
            MCTS,
            {
                "exploration": (0, 0.03, 0.1, 0.3, 1),
                "perturbation": (0.03, 0.05, 0.08, 0.12, 0.2, 0.3),
                "decay": (0.5, 0.7, 0.8, 0.9, 0.95, 1),
                "widening": (0.3, 0.5, 1, 2, 4),
            },
        ),
        ("CMA-ES", CMAES, {"sigma": (0.01, 0.02, 0.05, 0.07, 0.1, 0.2)}),
    ]
    cases = [(from_additive, noisy) for from_additive in (False, True) for noisy in (False, True)]
    titles = [f"from {'additive' if a else 'uniform'}{', noisy' if n else ''}" for a, n in cases]
    print("| engine | setting | " + " | ".join(titles) + " | mean |")
    print("|---|---|" + "---:|" * (len(cases) + 1))
    for name, make, settings in varied:
        for setting, values in settings.items():
            for value in values:
                engine = partial(make, **{setting: value})
                means = [
                    np.mean([found(engine, target, noisy, from_additive, seeds) for target in TARGETS])
                    for from_additive, noisy in cases
                ]
                cells = " | ".join(f"{mean:.2f}" for mean in [*means, np.mean(means)])
                print(f"| {name} | {setting} {value:g} | {cells} |", flush=True)
    print(f"\n{len(seeds)} seeds; true accuracy in percent, mean of the targets {TARGETS}, other settings at default.")


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--settings", action="store_true", help="vary the settings of MCTS and CMA-ES instead")
    arguments = parser.parse_args()
    if arguments.settings:
        vary_settings(range(100, 100 + arguments.seeds))
    else:
        compare_engines(range(arguments.seeds))


if __name__ == "__main__":
    main()
