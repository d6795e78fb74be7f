"""The pruner: the only room that knows all others below it."""
