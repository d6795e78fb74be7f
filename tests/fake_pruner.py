"""A pruner without a fit: random neuron orders, statistics and sketch for any model, made at once."""

import torch

from hf_lop.learning.config import LOPConfig
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size


def fake_pruner(model, *, sketch_rows=8, seed=0, predictor="mlp"):
    """A pruner for a model, on any device, whose plans differ from layer to layer."""
    size = measure_size(model, find_units(model))
    layers = len(size.widths)
    table = [
        {"ratio": r, "ratios": [r * (0.6 + 0.8 * i / max(1, layers - 1)) for i in range(layers)]} for r in (0, 0.7)
    ]
    pruner = LOPPruner(
        LOPConfig(
            base_model_type=model.config.model_type,
            base_dtype="float32",
            base_size=size.to_dict(),
            predictor=predictor,
            search_table=table,
            calibration={"search": "mcts"},
            max_ratio=0.7,
            sketch_rows=sketch_rows,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(width, generator=generator) for width in size.widths]
    pruner.neuron_order.copy_(torch.cat(orders).to(torch.uint16))
    columns = sum(size.widths) * size.block
    for name in ("mean", "square", "fluctuation", "norm"):
        getattr(pruner, name).copy_(torch.rand(columns, generator=generator) + 0.1)
    if sketch_rows:
        pruner.sketch.copy_(torch.randint(0, 256, pruner.sketch.shape, generator=generator, dtype=torch.uint8))
        pruner.sketch_scale.copy_(torch.rand(columns, generator=generator) * 0.05)
    return pruner.eval()
