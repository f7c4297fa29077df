"""The way in for other people's programs: `attach` puts a scoring run on a model, whichever library it comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from megascore.errors import ConfigError
from megascore.parallel.comm import agree
from megascore.scoring.places import ModelView
from megascore.scoring.plain import PlainModelView
from megascore.scoring.recipes import ScoreRequest, resolve_scores
from megascore.scoring.run import ScoringRun

__all__ = ["attach"]


def attach(
    model: nn.Module | Sequence[nn.Module],
    recipe: str | None = None,
    *,
    scores: Iterable[Mapping[str, Any] | ScoreRequest] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ScoringRun:
    """Score a model while your own loop runs it.

    Collective over the world where torch.distributed is initialised: all ranks attach, `step` and `finish` together.
    The model is put in evaluation mode until the run is closed. A plain PyTorch model counts as one data-parallel
    replica on each rank.

    Args:
        model: A Megatron-Core model, the list of its virtual-pipeline chunks, or a Hugging Face model; wrapped or not.
        recipe: Name of a list of scores; "minitron" if neither this nor ``scores`` is given.
        scores: The scores themselves, ``[{"target": "ffn", "method": "l2_norm"}, ...]``, instead of a recipe.
        metadata: JSON-able entries for the score file, such as the name of the data.

    Returns:
        A run: use it as a context manager, call ``step()`` after each batch and ``finish()`` at the end.

    Raises:
        ConfigError: both recipe and scores given, or unknown ones.
        ModelError: the model has no modules that megascore knows, or none for one of the scores.
        LayoutError: ranks disagree, or a parallel axis of the model cannot be placed.
    """
    if recipe is not None and scores is not None:
        raise ConfigError(f"attach was given recipe={recipe!r} and scores: give one of them.")
    requests = resolve_scores(scores if scores is not None else recipe or "minitron")
    return ScoringRun(agree("looking at the model", lambda: _view_of(model)), requests, metadata)


def _view_of(model: nn.Module | Sequence[nn.Module]) -> ModelView:
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    if _is_megatron(chunks):
        from megascore.mcore.view import MegatronModelView

        return MegatronModelView(chunks)
    if len(chunks) != 1:
        raise ConfigError(f"attach was given {len(chunks)} modules that are not Megatron-Core's: give one model.")
    return PlainModelView(chunks[0])


def _is_megatron(chunks: Sequence[nn.Module]) -> bool:
    """Tell whether any module is Megatron-Core's, without importing it: a model made with it has imported it."""
    megatron = sys.modules.get("megatron.core.transformer.module")
    return megatron is not None and any(
        isinstance(module, megatron.MegatronModule) for chunk in chunks for module in chunk.modules()
    )
