"""How far models are from the base that a pruner was made of: `python examples/benchmarks/identity.py`.

Prints a Markdown table of the least correlation of any matrix's run of 64 entries, over several seeds, for versions of a model
that a pruner may be used with, and for other models of the same shapes. The threshold of hf_lop lies between the two.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, Phi3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hf_lop import demo
from hf_lop.units.identity import NEAR, compare, sample_weights
from hf_lop.units.slice import prunable_units
from hf_lop.units.unit import take

SHAPE = {"vocab_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = {
    "Llama": lambda: LlamaConfig(hidden_size=128, intermediate_size=352, num_key_value_heads=2, **SHAPE),
    "Phi-3": lambda: Phi3Config(hidden_size=128, intermediate_size=352, bos_token_id=1, eos_token_id=2, **SHAPE),
    "GPT-2": lambda: GPT2Config(vocab_size=256, n_embd=128, n_layer=8, n_head=4, n_inner=512, n_positions=64),
}


def random(name: str, seed: int) -> Any:
    """A random model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def quantised(model: Any, bits: int, group: int = 32) -> Any:
    """Round all matrices to so many bits by groups of a row, and back."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rows = parameter.data.reshape(-1, group)
            step = (rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-12)
            parameter.data = ((rows / step).round() * step).reshape(parameter.shape)
    return model


def projections(model: Any, ffn: bool) -> list[str]:
    """Paths of the projections of the FFNs, or of all others in the decoder's layers."""
    units = prunable_units(model)
    inside = {slot.module for unit in units for slot in unit.slots}
    layers = tuple(unit.path.rpartition(".")[0] + "." for unit in units)
    names = [name for name, module in model.named_modules() if name.startswith(layers) and hasattr(module, "weight")]
    return [name for name in names if (name in inside) == ffn and model.get_submodule(name).weight.dim() > 1]


def tuned(model: Any, ffn: bool, seed: int, norm: float) -> Any:
    """A merged LoRA, whose change has a share `norm` of each weight's norm; adapters after training have 0.01 to 0.1."""
    names = projections(model, ffn)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = get_peft_model(model, LoraConfig(r=8, target_modules=names, init_lora_weights=False))
    for module in lora.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            change, weight = module.get_delta_weight("default"), module.get_base_layer().weight
            module.lora_B["default"].weight.data *= norm * float(weight.norm() / change.norm())
    return lora.merge_and_unload()


def trained(model: Any, seed: int, steps: int, rate: float) -> Any:
    """All weights after steps of AdamW on random tokens."""
    generator, optimiser = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        ids = torch.randint(3, 200, (4, 32), generator=generator)
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model


def permuted(model: Any, seed: int) -> Any:
    """The same function with the neurons of every FFN in another order."""
    for unit in prunable_units(model):
        take(model, unit, torch.randperm(unit.count, generator=torch.Generator().manual_seed(seed)))
    return model


def changes(other: Callable[[int], Any]) -> Iterator[tuple[str, Callable[[Any, int], Any]]]:
    """What is done to a base, given its copy and a seed."""
    yield "bfloat16", lambda model, _: model.bfloat16()
    yield "float16", lambda model, _: model.half()
    yield "8 bits and back", lambda model, _: quantised(model, 8)
    yield "4 bits and back", lambda model, _: quantised(model, 4)
    yield "LoRA on attention, 10 % of each norm", lambda model, seed: tuned(model, False, seed, 0.1)
    yield "LoRA on FFNs, 10 %", lambda model, seed: tuned(model, True, seed, 0.1)
    yield "LoRA on FFNs, 50 %", lambda model, seed: tuned(model, True, seed, 0.5)
    yield "one step of AdamW at 1e-4", lambda model, seed: trained(model, seed, 1, 1e-4)
    yield "50 steps of AdamW at 1e-3", lambda model, seed: trained(model, seed, 50, 1e-3)
    yield "neurons permuted", permuted
    yield "another seed", lambda _, seed: other(seed + 100)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    bases = {name: (random(name, 0), lambda seed, name=name: random(name, seed)) for name in CONFIGS}
    model, _ = demo.load_model()

    def shuffled(seed: int) -> Any:
        """The trained demo has one seed; all its matrices with their entries in another order stand for another."""
        found = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in found.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.data = parameter.data.flatten()[order].reshape(parameter.shape)
        return found

    bases["demo, trained"] = (model, shuffled)
    print(f"Least correlation (answers) over {len(seeds)} seeds; near from {NEAR}.\n")
    print("| change | " + " | ".join(bases) + " |\n|---|" + "---|" * len(bases))
    stored = {name: sample_weights(base) for name, (base, _) in bases.items()}
    rows: dict[str, list[str]] = {}
    for name, (base, other) in bases.items():
        for label, change in changes(other):
            if name.startswith("demo") and "AdamW" in label:
                rows[label].append("not run")
                continue
            found = [compare(stored[name], change(copy.deepcopy(base), seed)) for seed in seeds]
            low, high = min(value for _, value in found), max(value for _, value in found)
            answers = "/".join(sorted({answer for answer, _ in found}))
            rows.setdefault(label, []).append(f"{low:.3f} to {high:.3f} ({answers})")
    for label, cells in rows.items():
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
