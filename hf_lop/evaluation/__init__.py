"""Pruned and dense models in lmms-eval and lm-eval, the paper's benchmarks, and results on model cards.

hf_lop scores nothing itself: the harnesses of the extra `hf-lop[eval]` do. `plugin` is what lmms-eval finds when it starts.
"""
