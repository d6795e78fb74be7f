"""Writing checkpoints, whole or not at all, and pushing them."""
