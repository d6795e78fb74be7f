"""Planning and cutting at the shape of Qwen2.5-VL-7B's decoder, against their limits, in one run.

    python examples/benchmarks/pruning.py            # 4 of the 28 layers, about 4 GB of memory
    python examples/benchmarks/pruning.py --layers 28

Planning is timed for 28 layers on one core. Cutting is timed against the bare gather of the same rows and columns (the
limit) and a plain copy of the bytes that stay, in turn on fresh weights; extra memory is the peak above the start.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2 import Qwen2Config

from hf_lop.learning.config import LOPConfig
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import slice_units

HIDDEN, WIDTH = 3584, 18944  # Qwen2.5-VL-7B


def milliseconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def plan_milliseconds(layers: int = 28, runs: int = 50) -> dict[str, float]:
    """Time plans at changing ratios with every predictor, warm, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {}
    for name in ("transformer", "bilstm", "mlp"):
        size = {
            "widths": [WIDTH] * layers,
            "hidden_size": HIDDEN,
            "projections": 3,
            "parameters": 8_292_166_656,
            "num_bytes": 16_584_333_312,
            "flops": 14_000_000_000,
            "neuron_parameters": [3 * HIDDEN] * layers,
            "neuron_bytes": [6 * HIDDEN] * layers,
        }
        pruner = LOPPruner(LOPConfig(base_size=size, predictor=name)).eval()
        pruner.plan(0.3)
        times = [milliseconds(partial(pruner.plan, 0.2 + 0.01 * run)) for run in range(runs)]
        result[name] = statistics.median(times)
    torch.set_num_threads(threads)
    return result


def build(layers: int) -> Qwen2ForCausalLM:
    """Build decoder layers of the 7B shape with a tiny vocabulary, in bfloat16."""
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=16,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)  # touch every page, so that no first access falls into a measurement
    return model


def resident_bytes() -> int:
    """Memory of this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def gather(model: Qwen2ForCausalLM, kept: list[torch.Tensor]) -> None:
    """Bare index_select of the same rows and columns, freeing each old weight like the real thing."""
    for layer, index in zip(model.model.layers, kept, strict=True):
        layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data.index_select(0, index)
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.index_select(0, index)
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.index_select(1, index)


def copy_kept(model: Qwen2ForCausalLM, kept: list[torch.Tensor]) -> None:
    """Plain copy of as many bytes as stay."""
    for layer, index in zip(model.model.layers, kept, strict=True):
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            flat = module.weight.data.view(-1)
            module.weight.data = flat[: len(index) * HIDDEN].clone()


def main() -> None:
    """Run both benchmarks and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    keep = round(WIDTH * (1 - arguments.ratio))
    kept = [torch.randperm(WIDTH, generator=generator)[:keep].sort().values for _ in range(arguments.layers)]
    layer_bytes = 3 * HIDDEN * WIDTH * 2

    model = build(arguments.layers)
    before = resident_bytes()
    slice_units(model, kept)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert all(unit.count == keep for unit in find_units(model))

    times: dict[str, list[float]] = {"slice_units": [], "bare gather": [], "plain copy": []}
    for _ in range(arguments.runs):
        for name, run in (("slice_units", slice_units), ("bare gather", gather), ("plain copy", copy_kept)):
            del model
            model = build(arguments.layers)
            times[name].append(milliseconds(partial(run, model, kept)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["slice_units"], times[name], strict=True))
        for name in ("bare gather", "plain copy")
    }
    print(
        json.dumps(
            {
                "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                "torch": torch.__version__,
                "plan, 28 layers, 1 core, ms": {name: round(value, 2) for name, value in plan_milliseconds().items()},
                "layers cut": arguments.layers,
                "ratio": arguments.ratio,
                "milliseconds per layer": {name: round(v / arguments.layers, 1) for name, v in medians.items()},
                "slice_units / bare gather": round(ratios["bare gather"], 3),
                "slice_units / plain copy": round(ratios["plain copy"], 3),
                "extra memory / one layer": round(extra / layer_bytes, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
