"""How much of each layer to remove: layer ratios and budgets as plain numbers, never a model."""

from hf_lop.allocation.additive import additive_plans
from hf_lop.allocation.baselines import global_threshold, uniform
from hf_lop.allocation.budget import bisect_budget, parse_bytes, project
from hf_lop.allocation.cmaes import CMAES
from hf_lop.allocation.journal import Evaluation, Journal, merge_journals, read_journal
from hf_lop.allocation.mcts import MCTS
from hf_lop.allocation.search import Search, SearchResult, evaluate, run_search
from hf_lop.allocation.space import SearchSpace, project_ratios
from hf_lop.allocation.table import learn_table, target_grid

__all__ = [
    "CMAES",
    "MCTS",
    "Evaluation",
    "Journal",
    "Search",
    "SearchResult",
    "SearchSpace",
    "additive_plans",
    "bisect_budget",
    "evaluate",
    "global_threshold",
    "learn_table",
    "merge_journals",
    "parse_bytes",
    "project",
    "project_ratios",
    "read_journal",
    "run_search",
    "target_grid",
    "uniform",
]
