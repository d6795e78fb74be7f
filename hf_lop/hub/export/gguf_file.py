"""A pruned Llama-like text model as a GGUF file for stock llama.cpp, which reads one FFN width per layer as arch `deci`."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lop.errors import MissingDependencyError, UnsupportedModelError
from hf_lop.hub.export.gguf_tokenizer import pre_tokenizer_name, write_tokenizer
from hf_lop.planning.show import K_QUANTS

FAMILIES = ("llama", "mistral", "qwen2")
WAY_OUT = "Export it as uniform, which llama.cpp's own converter should read like any dense model (not tried)."
ROPES = ("default", "linear", "llama3")  # fixed frequencies without an attention factor


def check_config(config: Any) -> None:
    """Check that llama.cpp's `deci` computes what a model with this config computes.

    Args:
        config (`PreTrainedConfig`): of a pruned model.

    Raises:
        UnsupportedModelError: if not.
        MissingDependencyError: if the package gguf is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('GGUF files need the package gguf. Run: pip install "hf-lop[export]"') from error
    kind, rope = config.model_type, dict(getattr(config, "rope_parameters", None) or {})
    reason = None
    if config.get_text_config() is not config:
        reason = (
            "is multimodal: llama.cpp wants the vision part in a file of its own, and none of the architectures it has for "
            "such decoders reads one width per layer"
        )
    elif kind not in FAMILIES:
        reason = f"is none of {', '.join(FAMILIES)}: llama.cpp's only Llama-like architecture with one width per layer is deci"
    elif config.hidden_act != "silu":
        reason = f"has the activation {config.hidden_act}; deci computes silu"
    elif getattr(config, "sliding_window", None) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        reason = "attends through a sliding window, which deci does not have"
    elif rope.get("rope_type", "default") not in ROPES or rope.get("partial_rotary_factor", 1) != 1:
        reason = f"has rotary positions of type {rope.get('rope_type')}; hf_lop writes {', '.join(ROPES)}"
    if reason:
        raise UnsupportedModelError(f"A GGUF file cannot be made: this {kind} model {reason}. {WAY_OUT}")


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the output rows of a query or key projection `[H d, ...]`.

    Transformers rotates pairs (i, i + d/2) of a head, llama.cpp's `deci` pairs (2i, 2i + 1).
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, int]]:
    """All tensors under transformers' names, and how many rotated heads their rows are, 0 for none."""
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = model.get_input_embeddings().weight
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not (name.startswith("lm_head") and weight is tied):
            yield name, weight.detach(), heads.get(name.split(".")[-2], 0)


def _rope_factors(model: PreTrainedModel) -> np.ndarray | None:
    """By how much each rotary frequency is lower than the plain one, `[d/2] float32`; None where none is."""
    inv_freq = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    config: Any = model.config
    plain = config.rope_parameters["rope_theta"] ** -(
        torch.arange(0, len(inv_freq) * 2, 2).float() / len(inv_freq) / 2
    )
    factors = plain / inv_freq
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5) else factors.numpy()


def write_gguf(model: PreTrainedModel, tokenizer: Any, folder: Path, name: str) -> Path:
    """Write one GGUF file in the model's dtype; vectors are float32. No weight is copied but one at a time.

    Args:
        model (`PreTrainedModel`): a pruned model that passes [`check_config`].
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        folder (`Path`): where to write.
        name (`str`): name of the model; the file is `name-DTYPE.gguf`.

    Returns:
        `Path`: the file.

    Raises:
        UnsupportedModelError: if llama.cpp would compute or tokenize differently.
    """
    import gguf

    pre_tokenizer_name(tokenizer)  # refuses before anything is written
    config: Any = model.config
    if (common := math.gcd(*config.intermediate_size)) % K_QUANTS:
        warnings.warn(
            f"The widths are multiples of {common}: the file runs as it is, but llama.cpp's K-quants need multiples of {K_QUANTS}, "
            f"and its other quantisations of 32. To quantise it further, prune with round_to={K_QUANTS} and export that.",
            stacklevel=4,
        )
    layers = config.num_hidden_layers
    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32, "F32"),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, "F16"),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16, "BF16"),
    }
    if model.dtype not in kinds:
        raise UnsupportedModelError(
            f"A GGUF file cannot be made: the weights are {model.dtype}; hf_lop writes float32, float16 and bfloat16. "
            "Load the model in one of these with dtype=..., save it, and export that."
        )
    dtype, file_type, suffix = kinds[model.dtype]
    path = folder / f"{name}-{suffix}.gguf"
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(list(config.intermediate_size))
    writer.add_head_count([config.num_attention_heads] * layers)
    writer.add_head_count_kv([config.num_key_value_heads] * layers)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer, config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, layers)
    factors = _rope_factors(model)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for own, weight, _ in _tensors(model):
        theirs = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UnsupportedModelError(f"A GGUF file cannot be made: llama.cpp has no place for {own}. {WAY_OUT}")
        if weight.dim() == 1:
            writer.add_tensor_info(theirs, weight.shape, np.dtype(np.float32), weight.numel() * 4)
        else:
            itemsize = weight.element_size()
            shape = (*weight.shape[:-1], weight.shape[-1] * itemsize)
            writer.add_tensor_info(theirs, shape, np.dtype(np.uint8), weight.numel() * itemsize, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for _, weight, heads in _tensors(model):
        value = _interleaved(weight, heads) if heads else weight
        value = value.float() if value.dim() == 1 else value.contiguous().view(torch.uint8)
        writer.write_tensor_data(value.numpy())
    writer.close()
    return path
