"""Pruned models and pruners as Hub repositories."""
