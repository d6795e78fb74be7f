"""The five small text models that most tests use, and batches of random tokens for them.

Hidden size 32, FFN width 48, four layers, vocabulary 64; each has another kind of FFN.
"""

import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, Phi3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = {
    "gated": LlamaConfig(intermediate_size=48, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SMALL),
    "gated_bias": LlamaConfig(intermediate_size=48, num_key_value_heads=2, mlp_bias=True, **SMALL),
    "fused": Phi3Config(intermediate_size=48, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SMALL),
    "plain_bias": OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **SMALL),
    "conv1d": GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=64),
}


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
        for parameter in model.parameters():  # zero biases would hide a bias that was cut wrongly
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_batches(count, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(3, 64, (2, 10), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :4] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result
