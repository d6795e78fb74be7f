"""Questions and pictures of easy-VQA, in splits that share no picture.

The PyPI package easy-vqa (MIT) ships 4,000 and 1,000 pictures of one shape each, with questions about its colour and
shape and questions to be answered by yes or no.
"""

import hashlib
import importlib.util
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

COLOURS = ("black", "gray", "red", "green", "blue", "teal", "yellow", "brown")
SHAPES = ("rectangle", "circle", "triangle")
KINDS = {"colour": COLOURS, "shape": SHAPES, "yes/no": ("yes", "no")}
ANSWERS = tuple(answer for answers in KINDS.values() for answer in answers)
# Folder of the package, and which of its pictures, by their number's remainder by 2. The model was trained on all of "train".
SPLITS = {"calibration": ("train", (0,)), "search": ("train", (1,)), "report": ("test", (0, 1))}


class Question(NamedTuple):
    """A question about a picture of the package's folder "train" or "test"."""

    folder: str
    picture: int
    text: str
    answer: str

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return next(kind for kind, answers in KINDS.items() if self.answer in answers)


@cache
def read_questions(folder: str) -> tuple[Question, ...]:
    """Read all questions of "train" or "test", in the order of the package."""
    rows = json.loads((_data() / folder / "questions.json").read_text(encoding="utf-8"))
    return tuple(Question(folder, picture, text, answer) for text, answer, picture in rows)


@cache
def read_pictures(folder: str) -> torch.Tensor:
    """Read all pictures of "train" or "test": `[N, 3, 64, 64] uint8`."""
    import numpy as np
    from PIL import Image

    count = max(question.picture for question in read_questions(folder)) + 1
    paths = [_data() / folder / "images" / f"{index}.png" for index in range(count)]
    return torch.from_numpy(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])).movedim(3, 1)


def _data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("easy_vqa not found; the pictures come from there. Run: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def load_questions(split: str, count: int, *, seed: int = 0) -> list[Question]:
    """Draw questions from one split, one third of each kind. Splits share no picture.

    Two thirds of all questions can be answered without the picture, mostly those of yes and no: hence equal thirds.

    Args:
        split: "calibration" or "search", of pictures the tower was trained on; or "report", of others.
        count: number of questions; kinds take turns.
        seed: which questions of the split are drawn.

    Raises:
        ValueError: if the split is unknown or has fewer questions of a kind.
        ModuleNotFoundError: if the package with the pictures is missing.
    """
    there = _questions_of(split)
    dice = random.Random(seed)
    drawn = []
    for turn, kind in enumerate(KINDS):
        share = len(range(turn, count, len(KINDS)))
        of_kind = [question for question in there if question.kind == kind]
        if not 0 < share <= len(of_kind):
            raise ValueError(f"count is {count}; the split {split!r} has {len(of_kind)} questions of {kind}.")
        drawn.append(dice.sample(of_kind, share))
    return [drawn[index % len(KINDS)][index // len(KINDS)] for index in range(count)]


def load_groups(split: str, pictures: int, *, seed: int = 0) -> list[list[Question]]:
    """Draw pictures from one split, each with at most two questions of every kind, for `packed`.

    Raises:
        ValueError: if the split is unknown or has fewer pictures.
        ModuleNotFoundError: if the package with the pictures is missing.
    """
    there: dict[int, list[Question]] = {}
    for question in _questions_of(split):
        there.setdefault(question.picture, []).append(question)
    if not 0 < pictures <= len(there):
        raise ValueError(f"pictures is {pictures}; the split {split!r} has {len(there)} pictures.")
    dice = random.Random(seed)
    drawn = []
    for picture in dice.sample(sorted(there), pictures):
        mixed = dice.sample(there[picture], len(there[picture]))
        drawn.append([question for kind in KINDS for question in [q for q in mixed if q.kind == kind][:2]])
    return drawn


def _questions_of(split: str) -> list[Question]:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    folder, remainders = SPLITS[split]
    return [question for question in read_questions(folder) if question.picture % 2 in remainders]


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Scale bytes to -1 ... 1, as the processor does."""
    return pictures.float() / 127.5 - 1


def fingerprint(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of questions, to record on which data something was measured."""
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()
