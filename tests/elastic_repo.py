"""Pruners with a random neuron order, made without fitting, and elastic repositories of small models."""

from dataclasses import asdict

import torch

from hf_lop.configuration_lop import LOPConfig
from hf_lop.ffn.discovery import prunable_ffns
from hf_lop.ffn.size import measure_size
from hf_lop.pruner import LOPPruner


def random_pruner(model, seed=0, sketch_rows=0):
    """A pruner of a model with random order and statistics, and a predictor that learned nothing."""
    ffns = prunable_ffns(model)
    config = LOPConfig(
        base_model="org/base",
        base_model_type=model.config.model_type,
        base_size=asdict(measure_size(model, ffns)),
        predictor="mlp",
        sketch_rows=sketch_rows,
        max_ratio=0.9,
    )
    generator = torch.Generator().manual_seed(seed)
    pruner = LOPPruner(config).eval()
    order = [torch.randperm(ffn.width, generator=generator) for ffn in ffns]
    pruner.neuron_order.copy_(torch.cat(order).to(torch.uint16))
    for name in ("mean", "square", "fluctuation", "norm"):
        getattr(pruner, name).copy_(torch.rand(len(pruner.neuron_order), generator=generator) + 0.5)
    if sketch_rows:
        pruner.sketch.copy_(torch.randint(0, 256, pruner.sketch.shape, generator=generator, dtype=torch.uint8))
        pruner.sketch_scale.copy_(0.02 * torch.rand(pruner.sketch_scale.shape, generator=generator))
    return pruner
