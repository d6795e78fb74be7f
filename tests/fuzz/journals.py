"""Damage to the files by which a killed run goes on: of a search, of a fit with its probes, of a folder that is written."""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lop import LOPPruner
from hf_lop.hub.write import staging
from hf_lop.planning.journal import Journal
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from tests.fuzz.mutate import damaged, json_or_bytes, mutated, text_of
from tests.fuzz.target import Target, Wrong
from tests.fuzz.world import World
from tests.landscape import toy_reward
from tests.small_models import text_batches

SPACE = SearchSpace((40, 64, 64, 100), 0.4)
SETTINGS = {"model": "org/base", "reward": "divergence", "samples": 64}
LINES = "evaluations-00000.jsonl"


def damaged_lines(rng: random.Random, content: bytes) -> bytes:
    """Bytes of a file of lines, or values in one of them."""
    if rng.random() < 0.5:
        return damaged(rng, content)
    lines = content.split(b"\n")
    index = rng.randrange(len(lines) - 1)
    lines[index] = text_of(mutated(rng, json.loads(lines[index])))
    return b"\n".join(lines)


# -- A search ----------------------------------------------------------------------------------------------------------


def search(folder: Path) -> Any:
    with Journal(folder, SETTINGS) as journal:
        return run_search(CMAES(SPACE, seed=3), toy_reward, 12, journal=journal)


def searched(world: World) -> tuple[bytes, Any]:
    def make() -> tuple[bytes, Any]:
        found = search(world.root / "search")
        return (world.root / "search" / LINES).read_bytes(), found

    return world.once("search", make)


def run_searched(world: World, damage: bytes, folder: Path) -> None:
    (folder / LINES).write_bytes(damage)
    for _ in range(2):  # what the resumed one wrote is read as well
        if search(folder) != searched(world)[1]:
            raise Wrong("the search found something else")


# -- A fit -------------------------------------------------------------------------------------------------------------


def fit(world: World, folder: Path) -> LOPPruner:
    return LOPPruner.fit(
        world.dense(),
        text_batches(2),
        text_batches(1, seed=1),
        predictor="mlp",
        search="mcts",
        evaluations=3,
        targets=(0.3, 0.5),
        sketch_rows=8,
        journal=folder,
    )


def fitted(world: World) -> tuple[Path, LOPPruner]:
    folder = world.root / "fit"
    return folder, world.once("fit", lambda: fit(world, folder))


def make_fitted(file: str, world: World, rng: random.Random) -> bytes:
    content = (fitted(world)[0] / file).read_bytes()
    return damaged_lines(rng, content) if file == LINES else json_or_bytes(rng, json.loads(content))


def run_fitted(file: str, world: World, damage: bytes, folder: Path) -> None:
    kept, right = fitted(world)
    shutil.copytree(kept, folder / "journal")
    (folder / "journal" / file).write_bytes(damage)
    found = fit(world, folder / "journal")
    if file != LINES and b'"check"' not in damage:
        return  # as an older version wrote it: nobody can tell its numbers from others
    configs = [json.loads(pruner.config.to_json_string()) for pruner in (found, right)]
    seconds = [config["calibration"].pop("seconds") for config in configs]
    if configs[0] != configs[1]:
        raise Wrong(f"the config has other {[key for key in configs[1] if configs[0][key] != configs[1][key]]}")
    if seconds[0].keys() != seconds[1].keys() or not all(
        type(value) in (int, float) and 0 <= value < 1e9 for value in seconds[0].values()
    ):
        raise Wrong(f"the seconds are {seconds[0]}")
    for name, value in right.state_dict().items():
        if not torch.equal(found.state_dict()[name], value):
            raise Wrong(f"{name} is another")


# -- A folder that is written ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of a process."""


def stream(world: World, out: Path, stop: int | None = None) -> None:
    """Cut the dense model from file to file; with `stop`, the process ends after so many notes."""
    world.dense()
    pruner = world.once("loaded pruner", lambda: LOPPruner.from_pretrained(world.pruner()))
    note, notes = staging.Staging._note, []

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        note(self, *args, **kwargs)
        notes.append(args)
        if stop is not None and len(notes) > stop:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "LOT", 4000)
        patch.setattr(staging.Staging, "_note", noted)
        try:
            pruner.prune(world.root / "dense", 0.4, output_dir=out)
        except Killed:
            return
    if stop is not None:
        raise AssertionError("it was not killed")


def streamed(world: World) -> tuple[Path, dict[str, bytes]]:
    """What a killed run left, and what one that was not killed wrote."""

    def make() -> tuple[Path, dict[str, bytes]]:
        stream(world, world.root / "whole" / "out")
        stream(world, world.root / "killed" / "out", stop=20)
        return world.root / "killed", contents(world.root / "whole" / "out")

    return world.once("streamed", make)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_streamed(world: World, rng: random.Random) -> bytes:
    return damaged_lines(rng, (streamed(world)[0] / ".out.partial" / "journal.jsonl").read_bytes())


def run_streamed(world: World, damage: bytes, folder: Path) -> None:
    killed, right = streamed(world)
    shutil.copytree(killed, folder / "x")
    (folder / "x" / ".out.partial" / "journal.jsonl").write_bytes(damage)
    stream(world, folder / "x" / "out")
    found = contents(folder / "x" / "out")
    if found != right:
        raise Wrong(
            f"other files or bytes: {[name for name in {*found, *right} if found.get(name) != right.get(name)]}"
        )


TARGETS = [
    Target("journal-search", lambda world, rng: damaged_lines(rng, searched(world)[0]), run_searched),
    *(
        Target(f"journal-fit-{Path(file).stem.split('-')[0]}", partial(make_fitted, file), partial(run_fitted, file))
        for file in (LINES, "probes.json", "seconds.json")
    ),
    Target("journal-streamed", make_streamed, run_streamed),
]
