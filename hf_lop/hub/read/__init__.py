"""Reading checkpoints: configs, weights by ranges, models without weights."""
