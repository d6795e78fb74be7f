"""A kind of unit that is harder than FFN neurons, for tests only: key-value heads with their query heads.

Blocks of several rows, of other sizes in every tensor; in Phi-3 three runs of pieces in one tensor, the second and third with
a start; two config fields, one with two entries per piece, and a number of the attention module with a factor.
"""

from hf_lop.units.decoder import decoder_layers
from hf_lop.units.unit import Slot, Unit


def find_kv_groups(model):
    units = []
    for layer, (path, module) in enumerate(decoder_layers(model, lambda layer: hasattr(layer, "self_attn"))):
        attention, where = module.self_attn, f"{path}.self_attn"
        size, queries = attention.head_dim, attention.num_key_value_groups
        count = attention.o_proj.in_features // (size * queries)
        if hasattr(attention, "qkv_proj"):
            rows = [
                Slot(f"{where}.qkv_proj", "weight", 0, block=queries * size),
                Slot(
                    f"{where}.qkv_proj",
                    "weight",
                    0,
                    start=count * queries * size,
                    block=size,
                    parts=2,
                    stride=count * size,
                ),
            ]
        else:
            rows = [
                Slot(f"{where}.{name}", tensor, 0, block=block)
                for name, block in (("q_proj", queries * size), ("k_proj", size), ("v_proj", size))
                for tensor, _ in getattr(attention, name).named_parameters()
            ]
        output = Slot(f"{where}.o_proj", "weight", 1, block=queries * size, output=True)
        fields = (("num_key_value_heads", 1), ("num_attention_heads", queries))
        ints = tuple((where, name, queries) for name in ("num_heads",) if hasattr(attention, name))
        units.append(Unit("kv_groups", layer, where, count, (*rows, output), fields, ints))
    return units
