"""NaN, infinities and numbers near them in weights and batches: of a fit, statistics, rewards, and cuts with and without data."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lop import LOPPruner
from hf_lop.learning.rewards import REWARDS, Reward
from hf_lop.learning.statistics import Statistics, collect_statistics
from tests.fuzz.target import Target, Wrong
from tests.fuzz.world import World
from tests.helpers import logits, orders
from tests.small_models import text_batches

Batch = dict[str, torch.Tensor]
VALUES = ["nan", "inf", "-inf", "3e38", "-3e38", "1e30"]
PRUNES = ["sequential", "lstsq", "sketch", "fold", "auto", None]
METHODS = ["lop", "magnitude", "wanda", "flap"]


def make(world: World, rng: random.Random) -> bytes:
    state = world.dense().state_dict()
    name = rng.choice(sorted(state))
    where = rng.choice(["weight", "weight", "inputs_embeds", "mask", "labels"])
    made = {"where": where, "name": name, "index": rng.randrange(state[name].numel()), "value": rng.choice(VALUES)}
    made |= {"batch": rng.randrange(3), "entry": rng.randrange(2 * 10 * 32), "all": rng.random() < 0.1}
    made |= {
        "task": rng.choice(["fit", "statistics", "reward", "prune"]),
        "set": rng.choice(["calibration", "validation"]),
    }
    made |= {"reward": rng.choice(sorted(REWARDS)), "recover": rng.choice(PRUNES), "method": rng.choice(METHODS)}
    return json.dumps(made, indent=1).encode()


def planted(model: PreTrainedModel, case: dict[str, Any], batches: list[Batch]) -> list[Batch]:
    """Put a value into a weight, or into an entry of a batch."""
    value = float(case["value"])
    if case["where"] == "weight":
        with torch.no_grad():
            weight = model.state_dict()[case["name"]]
            weight.view(-1)[slice(None) if case["all"] else case["index"]] = value
        return batches
    batches = [dict(batch) for batch in batches]
    batch = batches[case["batch"] % len(batches)]
    if case["where"] == "mask":  # a mask of floats, as some collators make it
        batch["attention_mask"] = batch["attention_mask"].float()
        batch["attention_mask"].view(-1)[case["entry"] % batch["attention_mask"].numel()] = value
    elif case["where"] == "labels":
        batch["labels"] = batch["labels"].float()
        batch["labels"].view(-1)[case["entry"] % batch["labels"].numel()] = value
    else:
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().clone()
        embeds.view(-1)[case["entry"]] = value
        batch["inputs_embeds"] = embeds
    return batches


def labelled(count: int, seed: int) -> list[Batch]:
    return [{**batch, "labels": batch["input_ids"].clone()} for batch in text_batches(count, seed)]


def run(world: World, damage: bytes, folder: Path) -> None:
    case = json.loads(damage)
    {"fit": fit, "statistics": statistics, "reward": reward, "prune": prune}[case["task"]](world, case)


def statistics(world: World, case: dict[str, Any]) -> None:
    model = world.dense()
    finite([*collect_statistics(model, planted(model, case, labelled(3, 0)))])


def finite(layers: list[Statistics]) -> None:
    for number, layer in enumerate(layers):
        for name in Statistics.__slots__:
            if not getattr(layer, name).isfinite().all():
                raise Wrong(f"{name} of layer {number} is not finite")


def reward(world: World, case: dict[str, Any]) -> None:
    model = world.dense()
    batches = planted(model, case, labelled(3, 0))
    score = Reward.on(model, orders(model), batches, case["reward"])([48, 40, 30, 20])
    if not torch.tensor(score.value).isfinite():
        raise Wrong(f"the reward {case['reward']} is {score.value}")


def fit(world: World, case: dict[str, Any]) -> None:
    model = world.dense()
    sets = {"calibration": labelled(3, 0), "validation": labelled(2, 1)}
    sets[case["set"]] = planted(model, case, sets[case["set"]])
    pruner = LOPPruner.fit(
        model, sets["calibration"], sets["validation"], predictor="mlp", sketch_rows=8, targets=(0.2, 0.5)
    )
    for name, value in pruner.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Wrong(f"{name} of the pruner is not finite")
    if not torch.tensor(pruner.config.probes["damage"]).isfinite().all():
        raise Wrong("the probes are not finite")
    pruner.order()


def prune(world: World, case: dict[str, Any]) -> None:
    """A model of which nothing that stays was planted is pruned as ever; else it is refused."""
    model = world.dense()
    pruner = world.once("loaded pruner", lambda: LOPPruner.from_pretrained(world.pruner()))
    batches = planted(model, case, labelled(3, 0))
    sound = logits(model).isfinite().all()
    with_data = case["recover"] in ("sequential", "lstsq", "auto")
    found = pruner.prune(
        model, 0.4, data=batches if with_data else None, recover=case["recover"], method=case["method"]
    )
    if sound and not logits(found).isfinite().all():
        raise Wrong("a sound model became one that gives no numbers")
    if not sound and case["recover"] in (None, "fold"):  # what gave no numbers may go on giving none, but no others
        mask(world, case, found)


def mask(world: World, case: dict[str, Any], found: PreTrainedModel) -> None:
    """Refuse a cut model whose widths are not the plan's: nothing else of it can be compared."""
    if abs(sum(found.config.intermediate_size) - round(4 * 48 * 0.6)) > 1:
        raise Wrong(f"{case['name']}: {found.config.intermediate_size} is not what was asked for")


TARGETS = [Target("not-finite", make, run)]
