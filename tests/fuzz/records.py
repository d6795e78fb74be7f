"""Damage to what hf_lop records: the `pruning_config` of pruned models, and all of the config of pruners."""

import random
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_lop import LOPPruner
from hf_lop.hub.read.load import load_model
from tests.fuzz.mutate import HTML, LINK, ODD, json_or_bytes, mutated, text_of
from tests.fuzz.target import Target, Wrong
from tests.fuzz.world import World, config_of, linked, logits

RATIO = 0.4


def odd_words(rng: random.Random, made: dict[str, Any]) -> None:
    """Put something into a line of the card."""
    key = rng.choice(sorted(made))
    made[key] = rng.choice(
        [
            HTML,
            LINK,
            f"`{HTML}`",
            f"org/{HTML}",
            "org/a) [x](http://evil.example",
            {HTML: LINK},
            [HTML],
            f"a\n# b\n{HTML}",
            f"a\n```\n{HTML}",
        ]
    )


def make_record(world: World, rng: random.Random) -> bytes:
    config = config_of(world.pruned("gated").folder)
    if rng.random() < 0.4:
        odd_words(rng, config["pruning_config"])
    elif rng.random() < 0.1:
        config["pruning_config"] = rng.choice(ODD)
    else:
        config["pruning_config"] = mutated(
            rng, config["pruning_config"], (), {"calibration": [{"seconds": {"a": 1.0}}, {"recovery": 1}]}
        )
    return text_of(config)


def run_record(world: World, damage: bytes, folder: Path) -> None:
    pruned = world.pruned("gated")
    model = load_model(linked(pruned.folder, folder / "a", config_json=damage))
    model.save_pretrained(folder / "out")  # a card may fail no save
    check_card((folder / "out" / "README.md").read_text(), (pruned.folder / "README.md").read_text())
    for found in (model, load_model(folder / "out")):
        if not torch.equal(logits(found, pruned.inputs), pruned.logits):
            raise Wrong("what the record says changed the logits")


def check_card(text: str, usual: str) -> None:
    """Refuse a card with HTML or links that nobody but the record has put there, or with metadata that is not YAML."""
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    if not isinstance(data, dict) or set(data) - {
        *yaml.safe_load(usual.split("---\n", 2)[1]),
        "base_model",
        "base_model_relation",
        "language",
        "license",
    }:
        raise Wrong(f"the metadata of the card is {data}")
    if strange := outside_code(body) - outside_code(usual):
        raise Wrong(f"the card holds {sorted(strange)[:3]}")


def outside_code(text: str) -> set[str]:
    """The tags of HTML and the links to a bad host in Markdown."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"(`+)[^`].*?\1", "", text)
    return set(re.findall(r"<\s*/?\s*[a-zA-Z][^>]*>?|\]\(http://evil", text))


# -- Pruners -----------------------------------------------------------------------------------------------------------


def make_pruner(world: World, rng: random.Random) -> bytes:
    config = config_of(world.pruner())
    if rng.random() < 0.15:
        odd_words(rng, config)
        return text_of(config)
    heavy = (
        "base_size",
        "base_dtype",
        "predictor",
        "sketch_rows",
        "identity",
        "sorted_by",
        "format",
        "base_model_type",
        "max_ratio",
        "calibration",
    )
    return json_or_bytes(
        rng,
        config,
        heavy,
        {
            "elastic_config": [{"order": "x"}, {}],
            "auto_map": [{"AutoConfig": "x.Y"}],
            "sketch_rows": [0, 2, 4],
            "identity": [0, 64],
        },
    )


def expected(world: World) -> tuple[tuple[int, ...], torch.Tensor]:
    """Widths and logits of the undamaged pruner."""
    pruner = LOPPruner.from_pretrained(world.pruner())
    model = pruner.prune(world.dense(), RATIO)
    return pruner.plan(RATIO).widths, logits(model, world.pruned("gated").inputs)


def run_pruner(world: World, damage: bytes, folder: Path) -> None:
    widths, right = world.once("expected", lambda: expected(world))
    pruner = LOPPruner.from_pretrained(linked(world.pruner(), folder / "a", config_json=damage))
    str(pruner.plan(RATIO))
    # Other blocks than 1 are what a pruner may say, and other plans then.
    plan = pruner.plan(RATIO, round_to=1)
    if plan.widths != widths:
        raise Wrong(f"the plan is {plan.widths}, not {widths}")
    model = pruner.prune(world.dense(), RATIO, round_to=1)
    found = logits(model, world.pruned("gated").inputs)
    if not torch.equal(found, right):
        raise Wrong(f"logits differ by {(found - right).abs().max()}")
    pruner.save_pretrained(folder / "out")
    check_card((folder / "out" / "README.md").read_text(), (world.pruner() / "README.md").read_text())
    model.save_pretrained(folder / "model")
    check_card((folder / "model" / "README.md").read_text(), (world.pruned("gated").folder / "README.md").read_text())


# -- Probes and tables of pruners --------------------------------------------------------------------------------------


def make_probes(world: World, rng: random.Random) -> bytes:
    config = config_of(world.pruner())
    key = rng.choice(["probes", "probes", "search_table", "other_tables"])
    if rng.random() < 0.1:
        config[key] = rng.choice(ODD)
    elif config[key] is None:
        config[key] = mutated(rng, {"cmaes": config["search_table"], "additive": config["search_table"]})
    else:
        config[key] = (
            mutated(rng, config[key]) if isinstance(config[key], dict) else mutated(rng, {"x": config[key]}).get("x")
        )
    return text_of(config)


def run_probes(world: World, damage: bytes, folder: Path) -> None:
    """Plans of other numbers are other plans; they must be plans, and their estimate a number."""
    widths, _ = world.once("expected", lambda: expected(world))
    pruner = LOPPruner.from_pretrained(linked(world.pruner(), folder / "a", config_json=damage))
    plan = pruner.plan(RATIO)
    if plan.widths != widths:
        raise Wrong(f"the plan is {plan.widths}, not {widths}")
    estimate = pruner.config.estimate(widths)
    if estimate is not None and not 0 <= estimate < float("inf"):
        raise Wrong(f"the estimate is {estimate}")
    pruner.save_pretrained(folder / "out")
    method = random.Random(damage).choice(["additive", "mcts", "cmaes"])
    model = pruner.prune(world.dense(), RATIO, method=method, recover=None)
    kept = sum(model.config.intermediate_size)
    if abs(kept - round(4 * 48 * (1 - RATIO))) > 1 or not logits(model, world.pruned("gated").inputs).isfinite().all():
        raise Wrong(f"{kept} neurons are left")


TARGETS = [
    Target("pruning-config", make_record, run_record),
    Target("pruner-config", make_pruner, run_pruner),
    Target("pruner-probes", make_probes, run_probes),
]
