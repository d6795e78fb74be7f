"""The embedded demo: a small trained Qwen2.5-VL, the data it was trained for, and its pruner. All of it works offline.

```python
from hf_lop import demo

model, processor = demo.load_model()
report = demo.load_data("report")
print(demo.accuracy(demo.answer(model, processor, report), report))
```

Questions about colour and shape are perception, questions about owners and prices cognition (`hf_lop.demo.scenes`).
`examples/make_demo.py` made the files.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lop.errors import InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    from hf_lop.pruner.pruner import LOPPruner

MODEL_DIR = Path(__file__).parent / "model"
PRUNER_DIR = Path(__file__).parent / "pruner"
SPLITS = {"calibration": 400, "search": 400, "report": 1600}


def load_model() -> "tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]":
    """Load the dense demo model and its processor.

    The weights are stored in bfloat16 and computed with in float32, which is faster on a CPU at this size.

    Returns:
        `tuple`: the model, in evaluation mode on the CPU, and its processor.

    Raises:
        MissingDependencyError: if a package of the extra `demo` is not installed.
    """
    _need_extra()
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


def load_pruner() -> "LOPPruner":
    """Load the pruner trained for the demo model."""
    from hf_lop.pruner.pruner import LOPPruner

    pruner: LOPPruner = LOPPruner.from_pretrained(PRUNER_DIR)
    return pruner


def load_data(split: str, n: int | None = None) -> "Dataset":
    """Draw questions about pictures the model was not trained on.

    Four questions in a row are about the same picture: colour, shape, owner, price. A split always starts with the same
    questions, whatever `n` is, and no two splits share a picture.

    Args:
        split (`str`): `calibration`, `search` or `report`.
        n (`int`, *optional*): number of questions; 400, 400 and 1600 unless given.

    Returns:
        `Dataset`: columns `image` (PIL, RGB, 84 x 84), `question`, `answer` and `category` (`perception` or
        `cognition`).

    Raises:
        InvalidInputError: if there is no such split, or if `n` is below 1.
        MissingDependencyError: if a package of the extra `demo` is not installed.
    """
    if split not in SPLITS:
        raise InvalidInputError(f"Unknown split {split!r}. Choose one of {', '.join(SPLITS)}.")
    n = SPLITS[split] if n is None else n
    if n < 1:
        raise InvalidInputError(f"n is {n}, but a split has at least one question. Pass a positive number.")
    _need_extra()
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    features = Features({"image": Image(), "question": text, "answer": text, "category": text})
    return Dataset.from_list(list(islice(_rows(split), n)), features=features)


def messages(row: Mapping[str, Any], with_answer: bool = False) -> list[dict[str, Any]]:
    """Put one row of the data as a chat: the picture and the question, and the answer if asked for."""
    user = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    chat: list[dict[str, Any]] = [{"role": "user", "content": user}]
    if with_answer:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]})
    return chat


def batches(
    processor: Any, dataset: "Dataset", batch_size: int = 32, with_answer: bool = False
) -> Iterator[dict[str, Any]]:
    """Turn rows into model inputs, padded on the left.

    Args:
        processor (`Qwen2_5_VLProcessor`): the processor of the demo model.
        dataset (`Dataset`): rows of `load_data`.
        batch_size (`int`): rows per batch, at least 1; the last batch may have fewer.
        with_answer (`bool`): whether the right answer follows the question, and `labels` are given; else the inputs end
            where the model is to answer.

    Yields:
        `dict`: `input_ids`, `attention_mask` and `mm_token_type_ids` `[B, T] int64`, `pixel_values`
        `[36 B, 1176] float32`, `image_grid_thw` `[B, 3] int64`; with answers also `labels` `[B, T] int64`, which are
        -100 except at the answer and the end mark after it.
    """
    import torch

    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        inputs: dict[str, Any] = processor.apply_chat_template(
            [messages(row, with_answer) for row in rows],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=not with_answer,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        if with_answer:
            # Every answer is one token, so with padding on the left the answer and its end mark are the last two.
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -2:] = inputs["input_ids"][:, -2:]
            inputs["labels"] = labels
        yield dict(inputs)


def answer(model: Any, processor: Any, dataset: "Dataset", batch_size: int = 32) -> list[str]:
    """Answer every question by greedy generation, dense or pruned model alike.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`): the model that answers.
        processor (`Qwen2_5_VLProcessor`): its processor.
        dataset (`Dataset`): rows of `load_data`.
        batch_size (`int`): rows per call of `generate`, at least 1.

    Returns:
        `list[str]`: one answer per row.
    """
    answers: list[str] = []
    for inputs in batches(processor, dataset, batch_size):
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return answers


def accuracy(answers: Sequence[str], dataset: "Dataset") -> dict[str, float]:
    """Score answers by exact match.

    Args:
        answers (`Sequence[str]`): one answer per row of `dataset`.
        dataset (`Dataset`): rows of `load_data`.

    Returns:
        `dict[str, float]`: share of right answers, 0 to 1: `all`, and by category `perception` and `cognition`.

    Raises:
        InvalidInputError: if there is not one answer per row.
    """
    if len(answers) != len(dataset):
        raise InvalidInputError(f"{len(answers)} answers for {len(dataset)} questions. Give one answer per row.")
    right: dict[str, list[bool]] = {"all": []}
    for given, gold, category in zip(answers, dataset["answer"], dataset["category"], strict=True):
        right["all"].append(given == gold)
        right.setdefault(category, []).append(given == gold)
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def _rows(split: str) -> Iterator[dict[str, Any]]:
    from hf_lop.demo.scenes import draw_scene

    for index in count():
        scene = draw_scene(f"{split}/{index}")
        png = BytesIO()
        scene.image.save(png, format="png")
        for question in scene.questions:
            yield {
                "image": {"bytes": png.getvalue(), "path": None},
                "question": question.text,
                "answer": question.answer,
                "category": question.category,
            }


def _need_extra() -> None:
    missing = [name for name in ("PIL", "torchvision", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f'The demo needs {", ".join(missing)}, which this Python does not have. Run: pip install "hf-lop[demo]"'
        )
