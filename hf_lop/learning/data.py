"""From what users have, chats with pictures or plain text, to batches of model inputs, in splits that never overlap."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError, MissingDependencyError

IGNORED = -100  # label of a token that does not count, as everywhere in transformers


def read_rows(source: str, *, split: str = "train") -> Any:
    """Read samples from a file or a dataset on the Hub.

    Args:
        source (`str`): a .json, .jsonl, .parquet, .csv or .txt file, or a dataset's Hub id.
        split (`str`): split of a Hub dataset.

    Returns:
        `datasets.Dataset`: its rows, see [`as_messages`].

    Raises:
        InvalidInputError: if the file does not exist or is of another kind.
        MissingDependencyError: if the package datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("Reading data needs datasets. Run: pip install datasets") from error
    path = Path(source)
    builders = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
    if path.suffix in builders:
        if not path.is_file():
            raise InvalidInputError(f"{source} is no file. Pass a file, or the Hub id of a dataset.")
        call = partial(datasets.load_dataset, builders[path.suffix], data_files=str(path), split="train")
        return _loaded(source, call)
    if path.exists():
        raise InvalidInputError(f"{source} is of no known kind; pass a file ending in {', '.join(builders)}.")
    return _loaded(source, partial(datasets.load_dataset, source, split=split))


def _loaded(source: str, load: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise InvalidInputError(
            f"{source} cannot be read as data: {cause} Pass a file with one sample per row, or the Hub id of a dataset."
        ) from error


def split_rows(rows: Sequence[Any], parts: Sequence[int], seed: int = 0) -> list[list[Any]]:
    """Draw disjoint parts at random, such as calibration and search; what is left over is nobody's.

    A part depends on the sizes of the parts before it, never on those after it.

    Args:
        rows (`Sequence`): all samples, a list or a `datasets.Dataset`.
        parts (`Sequence[int]`): number of samples of each part.
        seed (`int`): of the draw.

    Returns:
        `list[list]`: the parts.

    Raises:
        InvalidInputError: if a part is empty, or there are too few rows.
    """
    if min(parts) < 1 or sum(parts) > len(rows):
        raise InvalidInputError(
            f"{len(rows)} rows cannot be split into parts of {list(parts)}. Each needs at least one row, and together "
            "they need no more than there are: pass fewer samples, or more data."
        )
    drawn = iter(random.Random(seed).sample(range(len(rows)), len(rows)))  # sampling fewer would draw others
    return [[rows[next(drawn)] for _ in range(count)] for count in parts]


def as_messages(row: Any) -> list[dict[str, Any]]:
    """Return one sample as a chat.

    Args:
        row: a list of messages; or a mapping with `messages`; or one with `question` and `answer`, and `image` or
            `images` (PIL images or paths) where there are pictures.

    Raises:
        InvalidInputError: if it is none of these.
    """
    if isinstance(row, Mapping):
        if row.get("messages"):
            row = row["messages"]
        elif "question" in row and "answer" in row:
            pictures = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
            content = [{"type": "image", "image": picture} for picture in pictures]
            return [
                {"role": "user", "content": [*content, {"type": "text", "text": str(row["question"])}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(row["answer"])}]},
            ]
    if isinstance(row, list) and row and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in row):
        return [dict(message) for message in row]
    keys = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise InvalidInputError(
        f"A sample has {keys}; it must have messages, or question and answer (and image), or text."
    )


def model_batches(
    processor: Any, rows: Sequence[Any], *, batch_size: int = 8, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Turn samples into batches of model inputs, padded on the left.

    Args:
        processor: the model's processor or tokenizer.
        rows (`Sequence`): chats (see [`as_messages`]), or plain texts (strings, or mappings with `text`).
        batch_size (`int`): samples per batch.
        max_length (`int`, *optional*): tokens at which plain texts are cut.

    Yields:
        `dict`: what the model's forward takes. Chats that end with an answer also have `labels` `[B, T] int64`, which are
        -100 except in that answer.

    Raises:
        InvalidInputError: if a sample is neither a chat nor a text.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        batch_size = 1  # nothing to pad with
    for start in range(0, len(rows), batch_size):
        part = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        texts = [
            row if isinstance(row, str) else row.get("text") if isinstance(row, Mapping) else None for row in part
        ]
        if all(isinstance(text, str) and text.strip() for text in texts):
            cut = {"truncation": True, "max_length": max_length} if max_length else {}
            yield dict(tokenizer(texts, **_padding(len(texts)), **cut))
        else:
            yield _chats(processor, [as_messages(row) for row in part])


def fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return 16 hexadecimal digits that depend on every tensor of every batch."""
    digest = sha256()
    for batch in batches:
        for key in sorted(batch):
            if isinstance(value := batch[key], torch.Tensor):
                digest.update(key.encode() + str(tuple(value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_fingerprint(rows: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that depend on every sample as it was given: its texts and the pixels of its pictures."""
    digest = sha256()

    def plain(value: Any) -> Any:
        if hasattr(value, "tobytes") and hasattr(value, "size"):  # pictures and arrays
            return [str(getattr(value, "mode", "")), str(value.size), sha256(value.tobytes()).hexdigest()]
        return str(value)

    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=plain).encode() + b"\n")
    return digest.hexdigest()[:16]


def fitting_parts(
    data: Any, samples: int, search_samples: int, report_samples: int | None, seed: int
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Split samples into calibration, search and report; see [`~LOPPruner.fit`] for the arguments.

    Returns:
        `tuple`: the parts by name, and what to record of them: dataset (where it has a name), samples of each part, seed.

    Raises:
        InvalidInputError: if the data is of another kind, or has too few samples.
    """
    rows = read_rows(data) if isinstance(data, str) else data
    if isinstance(rows, Mapping) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise InvalidInputError(
            f"data is a {type(data).__name__}; pass a list of samples, a datasets.Dataset (one split of it), or the name of a "
            "file or of a dataset on the Hub."
        )
    if len(rows) and isinstance(rows[0], Mapping) and {"input_ids", "inputs_embeds"} & set(rows[0]):
        raise InvalidInputError("data holds batches of model inputs; pass others as validation, to judge plans on.")
    spare = min(max(len(rows) - samples - search_samples, 0), 400)
    sizes = {"calibration": samples, "search": search_samples}
    if report_samples or (report_samples is None and spare):
        sizes["report"] = spare if report_samples is None else report_samples
    parts = dict(zip(sizes, split_rows(rows, list(sizes.values()), seed), strict=True))
    facts = {"dataset": Path(data).name if Path(data).exists() else data} if isinstance(data, str) else {}
    return parts, {**facts, "samples": sizes, "seed": seed}


def part_batches(
    processor: Any, part: str, rows: Sequence[Any], *, batch_size: int, max_length: int | None
) -> Iterator[dict[str, Any]]:
    """Turn a part of the samples into batches as [`model_batches`] does, with a progress bar on stderr."""
    with tqdm(total=len(rows), desc=f"preparing {part}", unit="sample") as bar:
        for batch in model_batches(processor, rows, batch_size=batch_size, max_length=max_length):
            yield batch
            bar.update(len(batch["input_ids"]))


def _padding(samples: int) -> dict[str, Any]:
    return {"return_tensors": "pt", **({"padding": True, "padding_side": "left"} if samples > 1 else {})}


def _chats(processor: Any, chats: list[list[dict[str, Any]]]) -> dict[str, Any]:
    inputs = _render(processor, chats, add_generation_prompt=False)
    if all(chat[-1]["role"] == "assistant" for chat in chats):
        prompts = _render(processor, [chat[:-1] for chat in chats], add_generation_prompt=True)
        lengths = inputs["attention_mask"].sum(1) - prompts["attention_mask"].sum(1)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for index, length in enumerate(lengths.tolist()):
            # Templates that close a turn differently before an answer give no clear start of it; then all tokens count.
            if length < 1 or not _starts_with(inputs, prompts, index, length):
                return inputs
            labels[index, -length:] = inputs["input_ids"][index, -length:]
        inputs["labels"] = labels
    return inputs


def _starts_with(inputs: dict[str, Any], prompts: dict[str, Any], index: int, length: int) -> bool:
    whole = inputs["input_ids"][index][inputs["attention_mask"][index].bool()]
    prompt = prompts["input_ids"][index][prompts["attention_mask"][index].bool()]
    return torch.equal(whole[: len(whole) - length], prompt)


def _render(processor: Any, chats: list[list[dict[str, Any]]], *, add_generation_prompt: bool) -> dict[str, Any]:
    """Apply the chat template; a tokenizer takes text contents only, so parts are joined for it."""
    options = _padding(len(chats))
    if hasattr(processor, "tokenizer"):
        return dict(
            processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=add_generation_prompt,
                processor_kwargs=options,
            )
        )
    plain = [[{**message, "content": _text(message["content"])} for message in chat] for chat in chats]
    side = options.pop("padding_side", None)
    return dict(
        processor.apply_chat_template(
            plain,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            tokenizer_kwargs={"padding_side": side} if side else None,
            **options,
        )
    )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
