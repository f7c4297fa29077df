"""Importance scores for Megatron-Core and Hugging Face models, the same on every parallel layout.

`attach` scores a model in your own loop, `load_scores` reads the result; README.md shows both.
"""

from __future__ import annotations

from megascore.api.attach import attach, score_blockwise
from megascore.api.checkpoints import checkpoints
from megascore.api.compensate import compensate
from megascore.api.evaluate import evaluate
from megascore.api.masked import masked_units
from megascore.plans.plan import Plan, plan
from megascore.plans.plan_file import load_plan
from megascore.pruning.prune import prune
from megascore.scores.rescore import merge, rescore
from megascore.scores.score_file import Scores, load_scores

__all__ = [
    "Plan",
    "Scores",
    "__version__",
    "attach",
    "checkpoints",
    "compensate",
    "evaluate",
    "load_plan",
    "load_scores",
    "masked_units",
    "merge",
    "plan",
    "prune",
    "rescore",
    "score_blockwise",
]

__version__ = "0.1.0"
