"""The vocabulary of a GGUF file: a byte-level BPE tokenizer, written so that llama.cpp cuts text as transformers does."""

import json
from typing import Any

from hf_lop.errors import CheckpointMismatchError, UnsupportedModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_BYTES, _WORD_BYTES = {"type": "ByteLevel", "use_regex": False}, {"type": "ByteLevel", "use_regex": True}
# llama.cpp's name of a pre-tokenizer, the steps it stands for, and whether whole words in the vocabulary skip the merges.
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_WORD_BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _WORD_BYTES], False),
    "qwen2": ([_split(_WORDS.replace("DIGITS", "")), _BYTES], False),
    "llama-bpe": ([_split(_WORDS.replace("DIGITS", "{1,3}")), _BYTES], True),
}


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer without what does not change the tokens."""
    found = pre_tokenizer or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    drop = {"trim_offsets": (True, False), "add_prefix_space": (False,)}
    return [{key: value for key, value in step.items() if value not in drop.get(key, ())} for step in steps]


def pre_tokenizer_name(tokenizer: Any) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer of the tokenizers library.

    Raises:
        UnsupportedModelError: if llama.cpp, as far as hf_lop knows it, has no like one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    way_out = "Write the GGUF file with llama.cpp's own converter from `--to uniform` (not tried)."
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, so its rules cannot be read. {way_out}"
        )
    rules = json.loads(backend.to_str())
    model, steps = rules["model"], _steps(rules["pre_tokenizer"])
    if (rules["normalizer"] or {"type": "NFC"})["type"] == "NFC" and model["type"] == "BPE":
        for name, (expected, ignore_merges) in PRE_TOKENIZERS.items():
            if steps == expected and bool(model.get("ignore_merges")) == ignore_merges:
                return name
    raise UnsupportedModelError(
        f"The tokenizer is {model['type']} on {[step.get('type') for step in steps]}; hf_lop writes byte-level BPE that cuts "
        f"text like {', '.join(PRE_TOKENIZERS)}. {way_out}"
    )


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer puts the begin token before a text, and the end token behind it."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a")["input_ids"])
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for behind in (False, True):
            if framed == bos * before + bare + eos * behind:
                return before, behind
    raise UnsupportedModelError(
        f"The tokenizer turns 'a' into {framed}, not {bare} between begin and end token; llama.cpp has no way to say that."
    )


def write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add a tokenizer to the metadata of a GGUF file.

    Args:
        writer (`gguf.GGUFWriter`): the file.
        tokenizer (`PreTrainedTokenizerBase`): byte-level BPE.
        rows (`int`): tokens of the model's embedding; those beyond the vocabulary are written as unused.

    Raises:
        UnsupportedModelError: if llama.cpp would cut text differently.
        CheckpointMismatchError: if the vocabulary is larger than the embedding.
    """
    name = pre_tokenizer_name(tokenizer)
    add_bos, add_eos = _frame(tokenizer)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(vocabulary) >= rows:
        raise CheckpointMismatchError(
            f"The tokenizer has a token {max(vocabulary)}, the model's embedding {rows} rows. Take both from the same commit."
        )
    added = tokenizer.added_tokens_decoder
    kinds = {index: CONTROL if token.special else USER_DEFINED for index, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([vocabulary.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([kinds.get(i, NORMAL if i in vocabulary else UNUSED) for i in range(rows)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for special in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{special}_token_id")) is not None:
            getattr(writer, f"add_{special}_token_id")(index)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    writer.add_add_space_prefix(False)
    if template := tokenizer.chat_template:
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)
