"""Tiny configs of any transformers model type: default configs with every size, depth and vocabulary reduced.

Attribute names mean the same over all families, so the rules are patterns over names, and equal names get equal
sizes in every part of a model: what has to fit together fits. A few types have defaults that do not build or that
need values no rule can guess; `FIXES` holds those.
"""

import re
from copy import deepcopy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCAB, HIDDEN, WIDTH, HEADS, HEAD_DIM, LAYERS = 128, 64, 96, 4, 16, 4
FIRST_WORD, LAST_WORD = 10, 90  # token ids that are never special in a tiny model

Config = dict[str, Any]

_DEPTH = re.compile(
    r"n_layers?|(conf_|num_|decoder_|encoder_|conf_num_|num_decoder_|num_encoder_)?(hidden_)?layers|depth|num_blocks"
    r"|num_layers_per_stack|resampler_depth|aligner_num_add_layers"
)
_INDICES = re.compile(r".*(index|indexes|indices|_ids|idxs|_layers)")
_TOKEN = re.compile(r".*(token_(id|ids|index)|token_id_.*|patch_id)")
_KEEP = re.compile(
    r"(task_)?type_vocab_size|chunk_size_.*|.*(kernel|patch|window|merge|image|group)_size|patch_dim|patch_embed_hidden_size|seed"
)
_SIZES = tuple(
    (re.compile(pattern), value)
    for pattern, value in (
        (r"vocab_size.*|.*_vocab_size(_.*)?|codebook_size|num_embeddings|.*group_vocab|ngram_vocab_size_base", VOCAB),
        (r"mamba_d_ssm", 2 * HIDDEN),
        (r".*mamba_(n|num)_heads|(swa_|sliding_)?num_.*value_heads_per_layer", HEADS),
        (r"mamba_(d_head|head_?dim)|attention_head_dim|qk_head_dim", 2 * HEAD_DIM),
        (r"(q|o|kv)_lora_rank", 2 * HEAD_DIM),
        (r"rotary_dim|hidden_size_per_layer_input", HEAD_DIM // 2),
        (
            r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|expert_dim|mlp_dim|feed_forward_size)|d_ff|dff"
            r"|dim_ff|d_inner|n_inner|moe_hidden_size",
            WIDTH,
        ),
        (
            r"(.*_)?hidden_size(_global)?|(.*_)?hidden_dim|d_model|n_embd|emb_dim|(.*_)?embed(ding)?_(dim|size)"
            r"|word_embed_proj_dim|(.*_)?(projection|out|output|in|input)_dim|lru_width|input_size|adapter_input_size"
            r"|classifier_proj_size|pooler_output_size|hidden_sizes|post_conv_.*|(.*_)?out_channels?|output_channels"
            r"|downsample_channels|nemo_conv_channels|ple_embed_dim",
            HIDDEN,
        ),
        (r"base_channels|num_filters|latent_channels", HIDDEN // 2),
        (r"(.*_)?num_(key_value|kv|key)_heads|kv_n_heads|num_query_groups", HEADS // 2),
        (r"(.*_)?(attention_heads(_per_layer)?|n_heads?|num_heads|heads|num_value_heads)", HEADS),
        (r"(.*_)?(head_(dim|size)|head_?dim|d_head|d_kv)|dim_head|kv_channels", HEAD_DIM),
        (r"(.*_)?(num_experts|num_local_experts|routed_experts|zero_expert_num)", 4),
        (r"(.*_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
        (r"n_group|topk_group|num_expert_group|(.*_)?shared_experts", 1),
        (r"n_groups|laurel_rank|num_kv_shared_layers|time_step_rank|mamba_dt_rank|adapter_rank|hc_lowrank", 2),
        (r"n_positions|n_ctx|max_(position_embeddings|seq_len|target_positions)|context_length", 512),
    )
)
_NEEDED = re.compile(
    r"head_dim|num_key_value_heads|num_experts|n_routed_experts|n_shared_experts|num_experts_per_tok|top_k_experts"
    r"|moe_intermediate_size"
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE_WORDS = {"<image>": 120, "<eoss>": 121, "IMGIMGAZ": 122, "<|extra_200|>": 121, "<|image token|>": 122}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_MLA = {"qk_nope_head_dim": HEAD_DIM // 2, "qk_rope_head_dim": HEAD_DIM // 2, "per_layer_config": {}}
_QUERIES = {"num_query_tokens": 2, "image_token_index": 120}
FIXES: dict[str, Config] = {
    "blip-2": _QUERIES,
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "dots3_note": {"text_config": _MLA},
    "dots3_note_text": _MLA,
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "fast_vlm": {"vision_config": {"architecture": "test_vit", "model_args": {}}},
    "gemma3n": {"vision_config": {"architecture": "test_vit"}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 2]], "downsample_rate": "4/8"},
    "instructblip": _QUERIES,
    "instructblipvideo": {"num_query_tokens": 2, "video_token_index": 120},
    "kosmos-2": {"latent_query_num": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "perception_lm": {"vision_config": {"architecture": "test_vit", "model_args": {"embed_dim": HIDDEN}}},
    "pi0": {"vlm_config": {"image_token_index": 120, "vision_config": {"image_size": 28}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 121},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 121},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}


def text_config_path(config: PreTrainedConfig) -> tuple[str, ...]:
    """Attribute names that lead from a config to its text config; empty when it is the text config itself."""
    target = config.get_text_config(decoder=True)
    for name in config.sub_configs if target is not config else ():
        sub = getattr(config, name, None)
        if sub is target:
            return (name,)
        if isinstance(sub, PreTrainedConfig) and sub.get_text_config(decoder=True) is target:
            return (name, *text_config_path(sub))
    return ()


PARTS = {
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    }
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type, shrunk: four text layers, two layers in every other tower."""
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:  # an older transformers has no default parts for it
        config = AutoConfig.for_model(model_type, **deepcopy(PARTS[model_type]))
    tiny = _Shrinker().shrink(config.to_dict(), LAYERS, text_config_path(config))
    _update(tiny, FIXES.get(model_type, {}))
    return type(config).from_dict(tiny)


def _update(config: Config, fixes: Config) -> None:
    for key, value in fixes.items():
        if value and isinstance(value, dict) and isinstance(config.get(key), dict):
            _update(config[key], value)
        else:
            config[key] = value


class _Shrinker:
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def shrink(self, config: Config, layers: int, text_path: tuple[str, ...] = ()) -> Config:
        depth = max((v for k, v in config.items() if _DEPTH.fullmatch(k) and isinstance(v, int)), default=0)
        picks = _pick_layers(config, depth, layers)
        tiny: Config = {}
        for key, value in config.items():
            if isinstance(value, dict) and "model_type" in value:
                on_path = text_path[:1] == (key,)
                tiny[key] = self.shrink(value, LAYERS if on_path else 2, text_path[1:] if on_path else ())
            elif key == "per_layer_config" and isinstance(value, dict):
                chosen = {int(k): v for k, v in value.items()}
                tiny[key] = {i: self.shrink(chosen[p], layers) for i, p in enumerate(picks) if p in chosen}
            elif key.endswith("rope_parameters"):
                tiny[key] = _shrink_rope(value, config)
            elif isinstance(value, dict) and key not in ("id2label", "label2id"):
                tiny[key] = {k: self.value(k, v, value, []) if isinstance(k, str) else v for k, v in value.items()}
            else:
                tiny[key] = self.value(key, value, config, picks)
        return tiny

    def value(self, key: str, value: Any, config: Config, picks: list[int]) -> Any:
        if isinstance(value, list):
            return self.list_value(key, value, config, picks)
        if isinstance(value, (float, bool)) or value == 0:
            return False if key == "use_cache" else value
        if value is None:
            return _size(key, 0, config) if _NEEDED.fullmatch(key) else None
        if not isinstance(value, int) or _KEEP.fullmatch(key):
            return value
        if _TOKEN.fullmatch(key):
            return self.token(value)
        if _DEPTH.fullmatch(key):
            return len(picks) or min(value, 2)
        if re.fullmatch(r".*(feature|insert|vision|spatial)_layer(_id)?", key):
            return max(min(value, len(picks) - 1), -2)
        return _size(key, value, config)

    def list_value(self, key: str, values: list[Any], config: Config, picks: list[int]) -> list[Any]:
        if picks and len(values) > max(picks) and _is_per_layer(key, values, config):
            if values == list(range(len(values))):
                return list(range(len(picks)))
            return [self.value(key, values[i], config, picks) for i in picks]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return values
        if key == "vision_feature_layer":
            return [-1, -2][: len(values)]
        if _TOKEN.fullmatch(key):
            return [self.token(v) for v in values]
        if picks and _INDICES.fullmatch(key):
            return [i for i, p in enumerate(picks) if p in values] or sorted({min(v, len(picks) - 1) for v in values})
        return [self.value(key, v, config, picks) for v in values]

    def token(self, token: int) -> int:
        """Small ids stay, others move to the end of the vocabulary; different ids stay different."""
        if 0 <= token < FIRST_WORD:
            return token
        return self.tokens.setdefault(token, VOCAB - 1 - len(self.tokens))


def _depth_of(config: Config) -> int:
    return max((v for k, v in config.items() if _DEPTH.fullmatch(k) and isinstance(v, int)), default=0)


def _is_per_layer(key: str, values: list[Any], config: Config) -> bool:
    return len(values) == _depth_of(config) > 0 and not isinstance(values[0], list) and not key.endswith("shape")


def _pick_layers(config: Config, depth: int, layers: int) -> list[int]:
    """Indices of the layers a tiny model imitates: every kind of layer in turn, in order of first appearance."""
    if not depth:
        return []
    lists = [v for k, v in config.items() if isinstance(v, list) and v and _is_per_layer(k, v, config)]
    lists = [v for v in lists if v != list(range(len(v)))]
    overrides = {int(k): str(v) for k, v in (config.get("per_layer_config") or {}).items()}
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i in range(depth):
        kinds.setdefault((*(str(v[i]) for v in lists), overrides.get(i)), []).append(i)
    groups = list(kinds.values())
    return [
        groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(min(layers, depth))
    ]


def _size(key: str, value: int, config: Config) -> int:
    if value == 1:
        return 1
    nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim")
    if nope and rope and config.get("head_dim") == nope + rope and key in ("qk_nope_head_dim", "qk_rope_head_dim"):
        return HEAD_DIM // 2
    if nope and rope and config.get("head_dim") == nope + rope == value and key == "qk_head_dim":
        return HEAD_DIM
    if key in ("head_dim", "num_heads") and config.get("expand"):  # state space models: heads cover expand * hidden
        return 2 * HEAD_DIM if key == "head_dim" else HEADS
    if key == "attention_hidden_size":
        return HIDDEN if value == config.get("hidden_size") else 2 * HIDDEN
    if key.endswith("num_key_value_heads") and value in (0, config.get(key.replace("key_value", "attention"))):
        return HEADS
    for pattern, size in _SIZES:
        if pattern.fullmatch(key):
            return size
    return value


def _shrink_rope(rope: Any, config: Config) -> Any:
    """Rope parameters with sections that fill a tiny head."""
    if not isinstance(rope, dict):
        return rope
    if not rope and config.get("layer_types"):
        rope = dict.fromkeys(config["layer_types"], _ROPE)
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _shrink_rope(v, config) if isinstance(v, dict) else v for k, v in rope.items()}
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    half = int(HEAD_DIM * factor) // 2
    side = 3 * half // 8
    return rope | {"mrope_section": [side, side, half - 2 * side]} if rope else rope
