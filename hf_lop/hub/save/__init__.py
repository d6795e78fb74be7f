"""Saving and pushing whole what hf_lop makes, whichever code calls transformers' methods."""
