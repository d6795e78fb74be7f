"""Make the files of the embedded demo, from nothing: `python examples/make_demo.py`.

Trains a Qwen2.5-VL of 0.6 million parameters on drawn pictures (`hf_lop/demo/scenes.py`) with one CPU thread, in three
lessons: its vision tower learns to name what is in each cell, the whole model learns to recite a board with the owners,
and then to answer questions. Seeds and numbers of steps are fixed. FFNs hold what a model has to remember: the many
owners are there so that removing neurons shows.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from hf_lop import LOPPruner, demo
from hf_lop.demo.scenes import (
    CATEGORIES,
    COLOURS,
    KINDS,
    NAMES,
    OWNERS,
    POSITIONS,
    SHAPES,
    SIZE,
    Question,
    Scene,
    draw_scene,
)

MARKS = ("pad", "unk", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIALS = [f"<|{mark}|>" for mark in MARKS]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE = 14, 2
BOARD = SIZE // (PATCH * MERGE)  # image tokens per side: one per cell
HIDDEN, WIDTH, LAYERS, HEADS, GROUPS = 96, 64, 8, 4, 2
LOOK, RECITE, ANSWER = (500, 64), (700, 32), (1900, 24)  # steps of each lesson, pictures per step

PICTURE = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * BOARD**2 + "<|vision_end|>"
REPLY = "<|im_end|>\n<|im_start|>assistant\n"
LEAD = 3  # tokens of PICTURE before the first image token
PICTURE_LENGTH = LEAD + BOARD**2 + 1


def make_processor() -> Qwen2_5_VLProcessor:
    """Build the processor: words as tokens, pictures as Qwen2.5-VL cuts them, a chat template of its form."""
    asked = [question.text.lower() for question in draw_scene("words").questions]
    words = {"user", "assistant", "system", *COLOURS, *SHAPES, *POSITIONS, *NAMES, *(str(n) for n in range(2, 13))}
    words.update(word for text in asked for word in text.replace("?", " ?").split())
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[2:],
        padding_side="left",
        model_max_length=512,
    )
    area = {"shortest_edge": SIZE**2, "longest_edge": SIZE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=area),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=area),
        chat_template=TEMPLATE,
    )


def make_model(processor: Qwen2_5_VLProcessor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Build the untrained model in float32."""
    index = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": index("<|im_end|>"),
        "pad_token_id": index("<|pad|>"),
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0, 1],
        "window_size": 112,
        "initializer_range": 0.06,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=index("<|image_pad|>"),
        video_token_id=index("<|video_pad|>"),
        vision_start_token_id=index("<|vision_start|>"),
        vision_end_token_id=index("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = index("<|im_end|>")
    model.generation_config.pad_token_id = index("<|pad|>")
    for layer in model.model.language_model.layers:
        _look_for_the_similar(layer.self_attn)
    return model


@torch.no_grad()
def _look_for_the_similar(attention: nn.Module) -> None:
    """Start queries close to their keys, so that tokens attend to similar tokens before anything is learnt."""
    size = attention.head_dim
    keys = torch.stack([nn.init.orthogonal_(torch.empty(size, HIDDEN)) for _ in range(GROUPS)])
    queries = keys.repeat_interleave(HEADS // GROUPS, dim=0).flatten(0, 1)
    attention.k_proj.weight.copy_(keys.flatten(0, 1))
    attention.q_proj.weight.copy_(queries + 0.02 * torch.randn_like(queries))
    attention.k_proj.bias.zero_()
    attention.q_proj.bias.zero_()


def optimise(
    name: str, parameters: Iterable[Tensor], rate: float, steps: int, loss_of: Callable[[int], tuple[Tensor, float]]
) -> None:
    """Minimise with AdamW, a short warm-up and a cosine; `loss_of(step)` gives the loss and the share of right answers."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    begin, right = time.monotonic(), 0.0
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)
        loss, share = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        right += share
        if (step + 1) % 100 == 0:
            done = f"{name} step {step + 1}/{steps}, {time.monotonic() - begin:.0f} s"
            print(f"{done}: loss {loss.item():.3f}, right {right / 100:.3f}", flush=True)
            right = 0.0


class Teacher:
    """The three lessons of one model."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def look(self, steps: int, batch: int, rate: float = 3e-3) -> None:
        """Teach the vision tower to name the colour, shape and position of every cell in the words of the text model."""
        words = self.model.get_input_embeddings().weight
        nothing = nn.Parameter(0.06 * torch.randn(HIDDEN))
        colours, shapes, positions = (self._ids(names) for names in (COLOURS, SHAPES, POSITIONS))

        def loss_of(step: int) -> tuple[Tensor, float]:
            scenes = self._scenes("look", step, batch)
            labels = torch.zeros(2, batch, 9, dtype=torch.long)
            for row, scene in enumerate(scenes):
                for thing in scene.things:
                    labels[0, row, thing.cell] = 1 + list(COLOURS).index(thing.colour)
                    labels[1, row, thing.cell] = 1 + SHAPES.index(thing.shape)
            seen = self.model.model.visual(*self._pixels(scenes).values()).pooler_output
            colour = seen @ torch.cat([nothing[None], words[colours]]).T
            shape = seen @ torch.cat([nothing[None], words[shapes]]).T
            place = seen @ words[positions].T
            loss = (
                functional.cross_entropy(colour, labels[0].flatten())
                + functional.cross_entropy(shape, labels[1].flatten())
                + functional.cross_entropy(place, torch.arange(9).repeat(batch))
            )
            return loss, (shape.argmax(-1) == labels[1].flatten()).float().mean().item()

        optimise("look", [*self.model.model.visual.parameters(), words, nothing], rate, steps, loss_of)

    def recite(self, steps: int, batch: int, rate: float = 2e-3) -> None:
        """Teach the model to list a board in any order: position, colour, shape, owner."""

        def loss_of(step: int) -> tuple[Tensor, float]:
            scenes = self._scenes("recite", step, batch)
            texts = [
                " ".join(f"{POSITIONS[t.cell]} {t.colour} {t.shape} {t.owner}" for t in scene.things)
                for scene in scenes
            ]
            tokens = self.tokenizer(
                [PICTURE + REPLY + text for text in texts], padding=True, padding_side="right", return_tensors="pt"
            )
            ids, real = tokens["input_ids"], tokens["attention_mask"]
            start = PICTURE_LENGTH + 3  # REPLY is three tokens
            place = torch.arange(ids.shape[1] - start) % 4 == 0  # positions come in any order, so none is predicted
            labels = ids[:, start:].masked_fill(place | (real[:, start:] == 0), -100)
            logits = self._logits(scenes, ids, self._positions([ids.shape[1] - PICTURE_LENGTH]), None)
            logits = logits[:, start - 1 : -1]
            taught = labels != -100
            loss = functional.cross_entropy(logits[taught], labels[taught])
            return loss, (logits.argmax(-1) == labels)[taught].float().mean().item()

        optimise("recite", self.model.parameters(), rate, steps, loss_of)

    def answer(self, steps: int, batch: int, rate: float = 2e-3) -> None:
        """Teach the model to answer; the questions of a picture share one sequence and do not see each other."""
        sample = draw_scene("words").questions  # questions of a kind all have the same number of tokens
        lengths = [len(self.tokenizer(self._turn(question))["input_ids"]) for question in sample]
        ends = PICTURE_LENGTH + torch.tensor(lengths).cumsum(0)
        segment = torch.cat(
            [torch.zeros(PICTURE_LENGTH), torch.arange(1, len(KINDS) + 1).repeat_interleave(torch.tensor(lengths))]
        )
        mask = ((segment[:, None] == segment) | (segment == 0)).tril()[None, None]
        positions = self._positions(lengths)

        def loss_of(step: int) -> tuple[Tensor, float]:
            scenes = self._scenes("answer", step, batch)
            texts = [PICTURE + "".join(self._turn(question) for question in scene.questions) for scene in scenes]
            ids = self.tokenizer(texts, return_tensors="pt")["input_ids"]
            logits = self._logits(scenes, ids, positions, mask.expand(batch, 1, -1, -1))
            words, answers = logits[:, ends - 3], ids[:, ends - 2]
            stops, marks = logits[:, ends - 2], ids[:, ends - 1]
            loss = functional.cross_entropy(words.flatten(0, 1), answers.flatten())
            loss = loss + 0.1 * functional.cross_entropy(stops.flatten(0, 1), marks.flatten())
            return loss, (words.argmax(-1) == answers).float().mean().item()

        optimise("answer", self.model.parameters(), rate, steps, loss_of)

    def _ids(self, words: Iterable[str]) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(words)))

    @staticmethod
    def _turn(question: Question) -> str:
        return f"{question.text}{REPLY}{question.answer}<|im_end|>"

    @staticmethod
    def _scenes(lesson: str, step: int, batch: int) -> list[Scene]:
        return [draw_scene(f"train/{lesson}/{step}/{row}") for row in range(batch)]

    def _pixels(self, scenes: list[Scene]) -> dict[str, Tensor]:
        inputs = self.processor.image_processor(images=[scene.image for scene in scenes], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}

    @staticmethod
    def _positions(lengths: list[int]) -> Tensor:
        """Positions (3, 1, tokens) of a picture followed by turns that each start right after it."""
        cell = torch.arange(BOARD)
        rows, columns = cell.repeat_interleave(BOARD), cell.repeat(BOARD)
        image = LEAD + torch.stack([torch.zeros_like(rows), rows, columns])
        lead = torch.arange(LEAD).expand(3, -1)
        after = LEAD + BOARD
        turns = torch.cat([torch.arange(after + 1, after + 1 + length) for length in lengths]).expand(3, -1)
        return torch.cat([lead, image, torch.full((3, 1), after), turns], dim=1)[:, None]

    def _logits(self, scenes: list[Scene], ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions.expand(-1, len(scenes), -1),
            attention_mask=mask,
            use_cache=False,
            **self._pixels(scenes),
        ).logits


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The dense model of the hf_lop demo

A `Qwen2_5_VLForConditionalGeneration` with {parameters:,} parameters ({layers} decoder layers, hidden size {hidden}, {width} FFN
neurons per layer), its image processor, a tokenizer of {words} words and a chat template. It answers four kinds of questions
about 84 x 84 pictures of coloured shapes on a 3 x 3 board, in one word, and knows nothing else: it exists so that pruning,
searching and reloading a multimodal language model can be tried in seconds, offline, on a CPU.

`python examples/make_demo.py --stage model` trained it from random weights on {pictures:,} drawn pictures. Weights are
stored in bfloat16; `hf_lop.demo.load_model()` computes in float32, and so does the table.

| questions | category | number | right |
|---|---|---|---|
{rows}

Measured by that command with greedy generation and exact match on the report split of `hf_lop.demo`, whose pictures were
not trained on. Colour and shape can be read off the picture; an owner is one of {facts} facts that the model remembers,
and a price adds up two values given by the shapes. What pruning does to this model says nothing of large ones.
"""


def train_model(out_dir: Path) -> None:
    """Train the model, save it with its processor, measure what was saved and write its card."""
    processor = make_processor()
    model = make_model(processor).train()
    teacher = Teacher(model, processor)
    teacher.look(*LOOK)
    teacher.recite(*RECITE)
    teacher.answer(*ANSWER)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(out_dir, dtype=torch.float32)
    (out_dir / "README.md").write_text(make_card(model, processor), encoding="utf-8")


def make_card(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> str:
    """Measure the model on the report split and write the card."""
    report = demo.load_data("report")
    answers = demo.answer(model, processor, report, batch_size=64)
    right = [given == gold for given, gold in zip(answers, report["answer"], strict=True)]
    rows = []
    for index, kind in enumerate(KINDS):
        hits = right[index :: len(KINDS)]  # a question of each kind in turn
        rows.append(f"| {kind} | {CATEGORIES[kind]} | {len(hits)} | {sum(hits) / len(hits):.2%} |")
    rows.append(f"| all | | {len(right)} | {sum(right) / len(right):.2%} |")
    return CARD.format(
        parameters=model.num_parameters(),
        layers=LAYERS,
        hidden=HIDDEN,
        width=WIDTH,
        words=len(processor.tokenizer),
        facts=len(OWNERS),
        pictures=sum(steps * batch for steps, batch in (LOOK, RECITE, ANSWER)),
        rows="\n".join(rows),
    )


def make_pruner(out_dir: Path) -> None:
    """Calibrate, probe, plan and train the pruner of the demo model, on data that the report split never shows."""
    model, processor = demo.load_model()
    calibration, search = demo.load_data("calibration"), demo.load_data("search")
    pruner = LOPPruner.fit(
        model,
        demo.batches(processor, calibration, 40, with_answer=True),
        demo.batches(processor, search, 40, with_answer=True),
        targets=[step / 200 for step in range(181)],
        provenance={
            "dataset": "hf_lop.demo, pictures drawn from seeds",
            "samples": f"{len(calibration)} for statistics, {len(search)} others for probes",
            "method": "single-layer probes (divergence of the answer), added up, dynamic programming",
        },
    )
    pruner.save_pretrained(out_dir)


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("model", "pruner", "all"), default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if arguments.stage in ("model", "all"):
        train_model(demo.MODEL_DIR)
    if arguments.stage in ("pruner", "all"):
        make_pruner(demo.PRUNER_DIR)


if __name__ == "__main__":
    main()
