"""Train the tower and projector of `easyvqa.py`, from nothing: some 40 minutes of one CPU thread with bfloat16 units.

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 python examples/beds/train_easyvqa.py

Three lessons. The tower first learns to name colour and shape, which the questions of the training pictures give away, while
the projector learns to put the words' embeddings where the language model will read them. Then both learn to answer
through the frozen language model, in the end mostly yes and no. There, a picture and several of its questions are one sequence: every question sees the
picture and itself, not the others. Each step draws from a seed of its own, so a run that was stopped goes on from its
checkpoint to the same weights. The variables for malloc keep it from giving memory back after each step.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import easyvqa
import smollm
import torch
from easyvqa_data import COLOURS, SHAPES, Question, load_groups, pixels, read_pictures, read_questions
from torch import Tensor, nn
from torch.nn import functional

# The learning rate falls by a cosine over `horizon` steps, times a line to zero over the last `cool` ones.
LOOK = {"steps": 2400, "horizon": 2400, "cool": 1, "pictures": 128, "tower": 1e-3, "projector": 1e-3}
ANSWER = {"steps": 700, "horizon": 700, "cool": 100, "pictures": 8, "questions": 8, "tower": 3e-4, "projector": 1e-3}
ANSWER |= {"open": 4}
# Colour and shape are right by now; what is left to learn is to answer yes and no.
REFINE = {"steps": 400, "horizon": 500, "cool": 100, "pictures": 8, "questions": 8, "tower": 3e-4, "projector": 1e-3}
REFINE |= {"open": 1}
SHIFT = 6  # pixels that a picture is moved at most
SAVE_EVERY, TEST_EVERY = 50, 300
TESTED = 100  # pictures


def attributes(folder: str) -> Tensor:
    """Collect what the questions tell about each picture: `[N, 2] int64`, colour and shape, -1 where they do not."""
    found = torch.full((len(read_pictures(folder)), 2), -1)
    for question in read_questions(folder):
        words = question.text.rstrip("?").split()
        named = [word for word in words if word in COLOURS + SHAPES]
        told = [question.answer] if question.answer in COLOURS + SHAPES else []
        if (question.answer == "yes") != bool(
            {"no", "not"} & set(words)
        ):  # "is there a ..." yes, "is there no ..." no
            told += named if question.answer in ("yes", "no") else []
        for word in told:
            column, names = (0, COLOURS) if word in COLOURS else (1, SHAPES)
            found[question.picture, column] = names.index(word)
    return found


def augment(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror, turn and move pictures `[B, 3, 64, 64]`, each in its own way; colour and shape stay what they are."""
    sides = torch.randint(8, (len(pictures),), generator=draw)
    moves = torch.randint(2 * SHIFT + 1, (len(pictures), 2), generator=draw)
    padded = functional.pad(pictures, (SHIFT,) * 4, mode="replicate")
    size = pictures.shape[-1]
    changed = []
    for picture, side, (down, right) in zip(padded, sides.tolist(), moves.tolist(), strict=True):
        moved = picture[:, down : down + size, right : right + size]
        turned = moved.rot90(side % 4, (1, 2))
        changed.append(turned.flip(2) if side >= 4 else turned)
    return torch.stack(changed)


class Lesson:
    """Steps of one lesson: its optimiser, its learning rates, its place in the checkpoint."""

    def __init__(self, name: str, plan: dict[str, Any], model: Any, extra: nn.Module, kept: Path, seed: int) -> None:
        self.name, self.plan, self.kept, self.seed = name, plan, kept, seed
        self.parts = nn.ModuleDict(
            {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector, "extra": extra}
        )
        rates = {"tower": plan["tower"], "projector": plan["projector"], "extra": plan["tower"]}
        self.rates = [rates[part] for part in self.parts]
        groups = [{"params": list(module.parameters()), "lr": rates[part]} for part, module in self.parts.items()]
        self.optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
        self.done = 0
        if kept.exists():
            state = torch.load(kept)
            if state["lesson"] == name:
                self.parts.load_state_dict(state["parts"])
                self.optimiser.load_state_dict(state["optimiser"])
                self.done = state["done"]

    def run(self, loss_of: Callable[[torch.Generator], Tensor], test: Callable[[], dict[str, float]]) -> None:
        """Take the steps that remain."""
        steps = self.plan["steps"]
        start, first = time.time(), self.done
        running = 0.0
        while self.done < steps:
            warm = min(1, (self.done + 1) / 50)
            share = warm * (0.02 + 0.98 * (1 + math.cos(math.pi * self.done / self.plan["horizon"])) / 2)
            share *= min(1, (steps - self.done) / self.plan["cool"])
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=False):
                group["lr"] = rate * share
            loss = loss_of(torch.Generator().manual_seed(self.seed * 1_000_003 + self.done))
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
            self.optimiser.step()
            self.done += 1
            running += loss.item() / 50
            if self.done % 50 == 0:
                pace = (time.time() - start) / (self.done - first)
                print(f"{self.name} {self.done}/{steps}: loss {running:.3f}, {pace:.2f} s a step", flush=True)
                running = 0.0
            if self.done % SAVE_EVERY == 0 or self.done == steps:
                self.save()
            if self.done % TEST_EVERY == 0 or self.done == steps:
                print(self.name, self.done, {key: round(value, 3) for key, value in test().items()}, flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"lesson": self.name, "done": self.done, "optimiser": self.optimiser.state_dict()}
        torch.save({**state, "parts": self.parts.state_dict()}, self.kept.with_suffix(".part"))
        self.kept.with_suffix(".part").replace(self.kept)


def look(model: Any, processor: Any, kept: Path, seed: int) -> None:
    """Lesson one: name colour and shape; even image tokens become the colour's word, odd ones the shape's."""
    embed = model.get_input_embeddings().weight.float()
    words = [embed[processor.tokenizer(" " + word)["input_ids"]].mean(0) for word in COLOURS + SHAPES]
    table = torch.stack(words)
    heads = nn.Linear(easyvqa.TOWER["hidden_size"], len(table))
    lesson = Lesson("look", LOOK, model, heads, kept, seed)
    tower, projector = lesson.parts["tower"], lesson.parts["projector"]
    known, pictures = attributes("train"), pixels(read_pictures("train"))
    scale = table.var()

    def names(inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen = tower(inputs).last_hidden_state[:, 1:]
        return heads(seen.mean(1)), seen

    def loss_of(draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (LOOK["pictures"],), generator=draw)
        label = known[chosen]
        logits, seen = names(augment(pictures[chosen], draw))
        loss = functional.cross_entropy(logits[:, : len(COLOURS)], label[:, 0], ignore_index=-1)
        loss = loss + functional.cross_entropy(logits[:, len(COLOURS) :], label[:, 1], ignore_index=-1)
        whole = (label >= 0).all(1)
        said = projector(seen[whole])
        wanted = torch.stack([table[label[whole, 0]], table[label[whole, 1] + len(COLOURS)]], 1)
        wanted = wanted.repeat(1, said.shape[1] // 2, 1)
        return loss + functional.mse_loss(said, wanted) / scale

    @torch.inference_mode()
    def test() -> dict[str, float]:
        label = attributes("test")
        logits = names(pixels(read_pictures("test")))[0]
        named = torch.stack([logits[:, : len(COLOURS)].argmax(1), logits[:, len(COLOURS) :].argmax(1)], 1)
        right = [(named == label)[label[:, column] >= 0, column].float().mean().item() for column in (0, 1)]
        return dict(zip(("colour", "shape"), right, strict=True))

    lesson.run(loss_of, test)


def answer(model: Any, processor: Any, kept: Path, seed: int) -> None:
    """Lesson two: answer the questions through the frozen language model."""
    _answer("answer", ANSWER, model, processor, kept, seed + 1)


def refine(model: Any, processor: Any, kept: Path, seed: int) -> None:
    """Lesson three: the same with more questions to be answered by yes or no."""
    _answer("refine", REFINE, model, processor, kept, seed + 2)


def _answer(name: str, plan: dict[str, Any], model: Any, processor: Any, kept: Path, seed: int) -> None:
    lesson = Lesson(name, plan, model, nn.Module(), kept, seed)
    tokens = easyvqa.answer_tokens(processor.tokenizer)
    by_picture: dict[int, list[Question]] = {}
    for question in read_questions("train"):
        by_picture.setdefault(question.picture, []).append(question)

    def predict(inputs: dict[str, Tensor], pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[N, V]` and answers `[N]` of the questions in a packed batch."""
        labels = inputs.pop("labels")
        sample, place = (labels >= 0).nonzero(as_tuple=True)
        hidden = model.model(**inputs | {"pixel_values": pictures}, use_cache=False).last_hidden_state
        return model.lm_head(hidden[sample, place - 1]).float(), labels[sample, place]

    def loss_of(draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(by_picture), (plan["pictures"],), generator=draw).tolist()
        dice = random.Random(int(torch.randint(2**31, (), generator=draw)))
        asked = []
        for index in chosen:
            # Two thirds of the questions can be guessed: some of those asked have answers of the other kinds.
            mixed = dice.sample(by_picture[index], len(by_picture[index]))
            open_ones = [question for question in mixed if question.kind != "yes/no"][: plan["open"]]
            closed = [question for question in mixed if question.kind == "yes/no"]
            asked.append(open_ones + closed[: plan["questions"] - len(open_ones)])
        pictures = augment(pixels(read_pictures("train")[chosen]), draw)
        return functional.cross_entropy(*predict(easyvqa.packed(processor, asked), pictures))

    @torch.inference_mode()
    def test() -> dict[str, float]:
        groups = load_groups("report", TESTED)
        logits = []
        for start in range(0, TESTED, 10):
            inputs = easyvqa.packed(processor, groups[start : start + 10])
            logits.append(predict(inputs, inputs["pixel_values"].float())[0])
        return easyvqa.judge(torch.cat(logits), list(chain.from_iterable(groups)), tokens)

    lesson.run(loss_of, test)


def main() -> None:
    """Train, or go on training, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("easyvqa_checkpoint.pt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=easyvqa.WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    processor = easyvqa.load_processor()
    model = easyvqa.build_model(smollm.load_model(), processor.tokenizer)
    model.model.language_model.requires_grad_(False)
    model.model.language_model.set_attn_implementation("eager")  # the backward pass of the other is twice as slow
    for lesson in (look, answer, refine):
        lesson(model, processor, arguments.checkpoint.with_suffix(f".{lesson.__name__}.pt"), arguments.seed)
    easyvqa.save_weights(model, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
