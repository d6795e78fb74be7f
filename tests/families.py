"""Every image-text-to-text and causal-LM type of transformers as a tiny random model, and inputs for it."""

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.shrink import FIRST_WORD, HIDDEN, LAST_WORD, tiny_config
from tests.tiny_models import randomize

MULTIMODAL = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
TEXT = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MULTIMODAL)))


def model_class(model_type: str) -> type:
    names = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if model_type in MULTIMODAL else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return getattr(transformers, names[model_type])


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of this type on the CPU, float32, in eval mode."""
    config, cls = tiny_config(model_type), model_class(model_type)
    if not isinstance(config, cls.config_class):  # the decoder of a larger model, built from its part of the config
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


def text_inputs(model: PreTrainedModel, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two rows of twelve ordinary words, and what else the forward pass of this family insists on."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    input_ids = torch.randint(FIRST_WORD, LAST_WORD, (2, 12), generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = input_ids
    config = model.config
    if extra := _EXTRA_INPUTS.get(config.model_type):
        extra(batch, random, config)
    return batch


def _pixels(batch, random, config):
    vision = getattr(config, "vision_config", None) or config.encoder
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    batch["pixel_values"] = random(2, 3, size, size)


def _frames(batch, random, config):
    _pixels(batch, random, config)
    batch["pixel_values"] = batch["pixel_values"][:, None]


def _queries(batch, random, config):
    (_frames if "video" in config.model_type else _pixels)(batch, random, config)
    batch["input_ids"][:, :2] = 120
    if "instruct" in config.model_type:
        batch["qformer_input_ids"] = batch["input_ids"][:, 2:]


def _idefics(batch, random, config):
    _frames(batch, random, config)
    batch["image_attention_mask"] = torch.ones(2, 12, 1)


def _kosmos(batch, random, config):
    batch["image_embeds"] = random(2, 1, HIDDEN)
    batch["image_embeds_position_mask"] = (torch.arange(12) == 3).long().expand(2, 12)


def _patches(batch, random, config):
    patches = random(2, 6, 2 + config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.arange(6)[:, None]
    words = batch["input_ids"]
    batch.clear()
    batch |= {"flattened_patches": patches, "decoder_input_ids": words}


def _boxes(batch, random, config):
    batch["bbox"] = torch.zeros(2, 12, 4)


def _robot(batch, random, config):
    size = config.vlm_config.vision_config.image_size
    batch["input_ids"][:, :4] = 120
    batch |= {"pixel_values": random(2, 1, 3, size, size), "state": random(2, config.max_state_dim)}
    batch["pixel_attention_mask"] = torch.ones(2, 1, dtype=torch.bool)
    batch |= {"noise": random(2, config.chunk_size, config.max_action_dim), "timestep": torch.full((2,), 0.5)}


# Most families read text alone; these do not.
_EXTRA_INPUTS = {
    "blip": _pixels,
    "blip-2": _queries,
    "idefics": _idefics,
    "instructblip": _queries,
    "instructblipvideo": _queries,
    "kosmos-2": _kosmos,
    "pi0": _robot,
    "pix2struct": _patches,
    "pp_formulanet": _pixels,
    "udop": _boxes,
    "vision-encoder-decoder": _pixels,
}
