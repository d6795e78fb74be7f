"""Pruned models for other runtimes."""
