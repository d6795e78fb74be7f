"""Elastic repositories: one checkpoint that gives every size."""
