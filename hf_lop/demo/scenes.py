"""The world of the demo: boards of coloured shapes and questions about them.

A picture is a 3 x 3 board of 3 to 7 objects. Four kinds of question are asked, in the two categories MME has: colour
and shape at a position are perception; the owner of an object (its colour, shape and position decide: 432 facts no picture
shows) and the price of two objects together are cognition. Everything is drawn from a name by `random.Random`: the same
name gives the same picture and questions on every machine.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CELL = 28
SIZE = 3 * CELL  # pixels per side of a picture
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
    "cyan": (60, 200, 220),
    "grey": (130, 130, 130),
}
PRICES = {"circle": 1, "square": 2, "triangle": 3, "diamond": 4, "cross": 5, "ring": 6}
SHAPES = tuple(PRICES)
POSITIONS = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
NAMES = ("anna", "boris", "clara", "dario", "elena", "felix", "greta", "hugo", "irene", "jonas", "klara", "leo")
CATEGORIES = {"colour": "perception", "shape": "perception", "owner": "cognition", "price": "cognition"}
KINDS = tuple(CATEGORIES)

_KNOWN = [(colour, shape, cell) for colour in COLOURS for shape in SHAPES for cell in range(9)]
OWNERS = dict(zip(_KNOWN, random.Random("owners").sample(NAMES * 36, len(_KNOWN)), strict=True))  # 36 things each


@dataclass(frozen=True, slots=True)
class Thing:
    """One object on the board.

    Attributes:
        cell: Its place, 0 (northwest) to 8 (southeast), row by row.
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
    """

    cell: int
    colour: str
    shape: str

    @property
    def owner(self) -> str:
        """The name that has to be known: nothing in the picture tells it."""
        return OWNERS[self.colour, self.shape, self.cell]

    @property
    def price(self) -> int:
        """1 to 6, by shape."""
        return PRICES[self.shape]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a picture.

    Attributes:
        kind: One of `KINDS`.
        text: The question.
        answer: The right answer, one word.
    """

    kind: str
    text: str
    answer: str

    @property
    def category(self) -> str:
        """`perception` or `cognition`."""
        return CATEGORIES[self.kind]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture (RGB, `SIZE` x `SIZE`), the things on it, and one question of each kind in the order of `KINDS`."""

    image: Image.Image
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


def draw_scene(name: str) -> Scene:
    """Draw the scene of a name.

    Args:
        name: Any string; equal names give equal scenes.
    """
    rng = random.Random(name)
    cells = rng.sample(range(9), rng.randint(3, 7))
    # Few colours and shapes per board: objects share them, so a position has to be looked up and not guessed.
    colours = rng.sample(list(COLOURS), rng.randint(2, 5))
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    things = tuple(Thing(cell, rng.choice(colours), rng.choice(shapes)) for cell in cells)
    image = _board(rng)
    canvas = ImageDraw.Draw(image)
    for thing in things:
        _draw(canvas, thing, rng)
    return Scene(image, things, tuple(_ask(kind, things, rng) for kind in KINDS))


def _board(rng: random.Random) -> Image.Image:
    # The tint changes from west to east and from north to south, which tells every patch where it is.
    ramp = np.linspace(175, 245, SIZE)
    red, blue = np.meshgrid(ramp, ramp)
    pixels = np.stack([red, np.full_like(red, 225), blue], axis=-1) + rng.randint(-8, 8)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw(canvas: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    r = rng.choice((rng.uniform(5, 7), rng.uniform(10, 12)))
    row, column = divmod(thing.cell, 3)
    x = (column + 0.5) * CELL + rng.uniform(-1, 1) * (CELL / 2 - r)
    y = (row + 0.5) * CELL + rng.uniform(-1, 1) * (CELL / 2 - r)
    colour = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[thing.colour])
    if thing.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(2, int(0.38 * r)))
    elif thing.shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif thing.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=colour)
    elif thing.shape == "diamond":
        canvas.polygon([(x, y - r), (x + 0.8 * r, y), (x, y + r), (x - 0.8 * r, y)], fill=colour)
    else:
        canvas.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=colour)
        canvas.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=colour)


def _ask(kind: str, things: tuple[Thing, ...], rng: random.Random) -> Question:
    thing, other = rng.sample(things, 2)
    place = POSITIONS[thing.cell]
    if kind == "colour":
        return Question(kind, f"What colour is the {place} object?", thing.colour)
    if kind == "shape":
        return Question(kind, f"What shape is the {place} object?", thing.shape)
    if kind == "owner":
        return Question(kind, f"Who owns the {place} object?", thing.owner)
    text = f"What is the price of the {place} plus the {POSITIONS[other.cell]} object?"
    return Question(kind, text, str(thing.price + other.price))
