"""Eleven tiny random models with image inputs: the families that tests use by name, without processors or downloads.

Hidden size 64, FFN width 96, four decoder layers, vocabulary 128; images are 16 x 16 pixels.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

IMAGE = 120  # token id that stands for image features
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IDEFICS = {
    "text_config": TEXT | {"model_type": "llama"},
    "vision_config": VISION,
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
        **QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
        "image_seq_length": 16,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    },
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "gemma3": {
        "text_config": TEXT | {"head_dim": 16, "sliding_window": 16},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 122,
        "eoi_token_index": 123,
    },
    "llama": TEXT,
    "qwen2": TEXT | {"tie_word_embeddings": True},
    "qwen3": TEXT | {"head_dim": 16},
}
TEXT_ONLY = ("llama", "qwen2", "qwen3")


def randomize(model: nn.Module) -> None:
    """Draw all weights anew: zeros and small values at the start would hide the effect of the FFN."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model on the CPU, float32, in eval mode; equal seeds give equal weights."""
    auto = AutoModelForCausalLM if name in TEXT_ONLY else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
        randomize(model)
    return model


def tiny_inputs(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for one prompt with one image (words alone for the language models)."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 100, (1, 9), generator=generator)
    if name in TEXT_ONLY:
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}
    image = [IMAGE] * (16 if name == "llava" else 4)
    if name.startswith("qwen"):
        image = [122, *image, 123]
    input_ids = torch.cat([words[:, :4], torch.tensor([image]), words[:, 4:]], dim=1)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if name.startswith("qwen"):  # 4 x 4 patches of 3 channels x 2 frames x 4 x 4 pixels, merged to 2 x 2 tokens
        batch["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        batch["mm_token_type_ids"] = (input_ids == IMAGE).long()
    elif name in ("smolvlm", "idefics3"):
        batch["pixel_values"] = torch.randn(1, 1, 3, 16, 16, generator=generator)
        batch["pixel_attention_mask"] = torch.ones(1, 1, 16, 16, dtype=torch.int64)
    else:
        batch["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    if name == "gemma3":
        batch["token_type_ids"] = (input_ids == IMAGE).long()
    return batch
