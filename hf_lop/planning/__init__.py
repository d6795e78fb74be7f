"""How much of each layer to remove: layer ratios, budgets and searches as plain numbers, never a model."""
