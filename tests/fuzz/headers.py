"""Damage to the headers of model.safetensors: of a pruned model that is loaded, and of a dense one that is cut from file to file."""

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_lop import LOPPruner
from hf_lop.hub.read.load import load_model
from tests.fuzz.mutate import damaged, mutated, text_of
from tests.fuzz.target import Target, Wrong
from tests.fuzz.world import World, linked, logits

KNOWN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KNOWN |= {"U16": torch.uint16, "I16": torch.int16, "U8": torch.uint8}  # what a pruner holds besides


def split(file: Path) -> tuple[bytes, bytes]:
    """The header of a file, with its length before it, and the tensors."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:end], content[end:]


def make(source: str, world: World, rng: random.Random) -> bytes:
    head, _ = split(folder_of(source, world) / "model.safetensors")
    if rng.random() < 0.3:
        return damaged(rng, head)
    entries: dict[str, Any] = json.loads(head[8:])
    names = sorted(entries.keys() - {"__metadata__"})
    change, one, other = rng.randrange(5), rng.choice(names), rng.choice(names)
    if change == 0:
        alike = [name for name in names if entries[name]["shape"] == entries[one]["shape"]]
        other = rng.choice([other, *alike])
        entries[one], entries[other] = entries[other], entries[one]
    elif change == 1:
        entries[one]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U32", "F8_E4M3", "BOOL", "C64", "F4", "X"])
    elif change == 2:
        entries[one]["shape"] = rng.choice(
            [entries[one]["shape"][::-1], [], [-1, -8], [*entries[one]["shape"], 1], [2**40, 2**40]]
        )
    elif change == 3:
        entries[one + rng.choice([".x", " ", "\u0000"])] = entries.pop(one)
    else:
        entries = mutated(rng, entries)
    text = text_of(entries)
    length = (
        len(text)
        if rng.random() < 0.9
        else rng.choice([0, 1, len(text) - 1, len(text) + 1, 10**8 + 1, 2**63, 2**64 - 1])
    )
    return length.to_bytes(8, "little") + text


def folder_of(source: str, world: World) -> Path:
    if source == "pruner":
        return world.pruner()
    if source == "pruned":
        return world.pruned("gated").folder
    world.dense()
    return world.root / "dense"


def as_written(file: Path) -> dict[str, torch.Tensor]:
    """What a file says by the letter of the format, read by nobody's code: names may have been swapped."""
    head, body = split(file)
    entries = json.loads(head[8:])
    found = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            if entry["dtype"] not in KNOWN:
                raise Wrong(f"{name} is {entry['dtype']}, and was taken for numbers")
            start, end = entry["data_offsets"]
            found[name] = torch.frombuffer(bytearray(body[start:end]), dtype=KNOWN[entry["dtype"]]).reshape(
                entry["shape"]
            )
    return found


def run_pruned(world: World, damage: bytes, folder: Path) -> None:
    pruned = world.pruned("gated")
    _, body = split(pruned.folder / "model.safetensors")
    linked(pruned.folder, folder / "a", model_safetensors=damage + body)
    found = logits(load_model(folder / "a"), pruned.inputs)
    if not torch.equal(found, pruned.logits):
        right = copy.deepcopy(world.once("reference", lambda: load_model(pruned.folder)))
        right.load_state_dict(as_written(folder / "a" / "model.safetensors"), strict=True)
        if not torch.equal(found, logits(right, pruned.inputs)):
            raise Wrong("logits are those of other weights than the file holds")


def run_dense(world: World, damage: bytes, folder: Path) -> None:
    dense, pruned = folder_of("dense", world), world.pruned("gated")
    _, body = split(dense / "model.safetensors")
    linked(dense, folder / "a", model_safetensors=damage + body)
    pruner = world.once("loaded pruner", lambda: LOPPruner.from_pretrained(world.pruner()))
    pruner.prune(folder / "a", 0.4, output_dir=folder / "out")
    found = logits(load_model(folder / "out"), pruned.inputs)
    right = world.dense()
    right.load_state_dict(as_written(folder / "a" / "model.safetensors"), strict=True)
    expected = logits(pruner.prune(right, 0.4), pruned.inputs)
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise Wrong(f"logits differ by {(found - expected).abs().max()} from pruning in memory")


def run_pruner(world: World, damage: bytes, folder: Path) -> None:
    _, body = split(world.pruner() / "model.safetensors")
    linked(world.pruner(), folder / "a", model_safetensors=damage + body)
    found = LOPPruner.from_pretrained(folder / "a")
    found.plan(0.4)
    found.order()
    if not all(torch.equal(found.state_dict()[name], value) for name, value in right_pruner(world).items()):
        written = as_written(folder / "a" / "model.safetensors")
        for name, value in found.state_dict().items():
            if not torch.equal(value, written[name].to(value.dtype)):
                raise Wrong(f"{name} is not what the file holds")


def right_pruner(world: World) -> dict[str, torch.Tensor]:
    return world.once("loaded pruner", lambda: LOPPruner.from_pretrained(world.pruner())).state_dict()


TARGETS = [
    Target("header-pruner", partial(make, "pruner"), run_pruner),
    Target("header-pruned", partial(make, "pruned"), run_pruned),
    Target("header-streamed", partial(make, "dense"), run_dense),
]
