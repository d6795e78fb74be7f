"""Tiny pruned models in folders, with tokenizers of the kinds that llama.cpp knows."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_lop.hub.export.gguf_tokenizer import PRE_TOKENIZERS
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import slice_units
from tests.tiny_models import TEXT, randomize

WIDTHS = [96, 40, 17, 64]
PROSE = "The 12 cats' 3456 naps: it's 7am, they're off!\n\n  Zwölf Katzen  schlafen,\tdon't they?\r\n日本語 \U0001f600 x=1;y==22"


def prune_tiny(model, widths=WIDTHS):
    """Keep neurons drawn at random, as many as said, and write down how, as `LOPPruner.prune` does."""
    size = measure_size(model, find_units(model))
    generator = torch.Generator().manual_seed(3)
    kept = [torch.randperm(w, generator=generator)[:k] for w, k in zip(size.widths, widths, strict=True)]
    slice_units(model, kept)
    model.config.pruning_config = {
        "method": "lop",
        "recovery": None,
        "ratio": 0.4,
        "criterion": "l2",
        "round_to": 1,
        "base_model": None,
        "base_revision": None,
        "pruner": None,
        "dense_widths": list(size.widths),
        "dense_parameters": size.parameters,
        "dense_bytes": size.num_bytes,
    }
    return model


def tokenizer(kind="gpt-2", **special):
    """A byte-level BPE tokenizer that cuts words like one of llama.cpp's, with one special and one ordinary added token."""
    steps, ignore_merges = PRE_TOKENIZERS[kind]
    cut = [
        pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated")
        if step["type"] == "Split"
        else pre_tokenizers.Digits(individual_digits=True)
        if step["type"] == "Digits"
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"])
        for step in steps
    ]
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = cut[0] if len(cut) == 1 else pre_tokenizers.Sequence(cut)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    made.train_from_iterator([PROSE, "the cats they're 12 34 3456 napping  napping 7am"] * 3, trainer)
    made.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>", **special)


def text_model(kind, dtype=torch.float32, **changes):
    """A tiny random language model with 320 tokens."""
    config = AutoConfig.for_model(kind, **TEXT | {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        randomize(model)
    return model.to(dtype)


def save(model, folder, kind="gpt-2"):
    model.save_pretrained(folder)
    tokenizer(kind, chat_template="{{ messages[0]['content'] }}").save_pretrained(folder)
    return folder
