"""The ways in for other people's programs: scoring in their own loop, and one block at a time."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascore.blockwise.empty_model import empty_model
from megascore.blockwise.offload_hooks import REMOVE_HOOKS, has_offload_hook
from megascore.blockwise.score_blocks import BlockwiseOptions, score_blocks
from megascore.capture import TensorStore
from megascore.capture.block_inputs import refuse_single_tensor
from megascore.errors import ConfigError, ModelError
from megascore.parallel.comm import agree
from megascore.runs.scoring_run import ScoringRun
from megascore.scores.score_file import Scores
from megascore.sites.places import ModelView
from megascore.sites.plain import PlainModelView
from megascore.sites.requests import ScoreRequest, refuse_needing_job, resolve_scores
from megascore.sites.towers import part_of

__all__ = ["attach", "score_blockwise", "view_of"]

COUNTED = {
    "num_tokens",
    "num_samples",
    "num_steps",
    "sites",
    "scores",
    "layout",
    "blockwise",
    "schema_version",
    "unseen",
    "not_scored",
    "part",
}
"""Entries of a score file's metadata that a run finds out."""


def attach(
    model: nn.Module | Sequence[nn.Module],
    recipe: str | None = None,
    *,
    scores: Iterable[Mapping[str, Any] | ScoreRequest] | None = None,
    metadata: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> ScoringRun:
    """Score a model while your own loop runs it.

    Collective over the world where torch.distributed is initialised: all ranks attach, `step` and `finish` together.
    The model is put in evaluation mode until the run is closed. A plain PyTorch model counts as one data-parallel
    replica on each rank. Rank 0 warns, by name, of modules with channels, heads or experts of kinds that are not known.

    Args:
        model: A Megatron-Core model, the list of its virtual-pipeline chunks, or a Hugging Face model; wrapped or not.
        recipe: Name of a list of scores; "low_loss" if neither this nor ``scores`` is given.
        scores: The scores themselves, ``[{"target": "ffn", "method": "l2_norm"}, ...]``, instead of a recipe.
        metadata: JSON-able entries for the score file, such as the name of the data.
        part: Dotted name of the part to score, such as "model.language_model", of a model with several stacks of
            layers that does not say which one is its language model. Your loop runs the whole model as ever.

    Returns:
        A run: use it as a context manager, call ``step()`` after each batch and ``finish()`` at the end.

    Raises:
        ConfigError: both recipe and scores given, or unknown ones; or scores that only a job can measure.
        ModelError: the model has no modules that megascore knows, or none for one of the scores.
        LayoutError: ranks disagree, or a parallel axis of the model cannot be placed.
    """
    if recipe is not None and scores is not None:
        raise ConfigError(f"attach was given recipe={recipe!r} and scores: give one of them.")
    requests = resolve_scores(scores if scores is not None else recipe or "low_loss")
    refuse_needing_job(requests, "attach")
    _warn_of_lone_processes()
    agree("looking at the metadata", lambda: _check_metadata(metadata))
    view = agree("looking at the model", lambda: view_of(_part_of(model, part)))
    agree("looking at the weights", lambda: _check_weights(view))
    # A name such as decoder.layers.0 is of the part alone.
    return ScoringRun(view, requests, {**(metadata or {}), **({} if part is None else {"part": part})})


def score_blockwise(
    model: nn.Module | str | Path,
    blocks: nn.ModuleList | Sequence[nn.Module] | str | None,
    batches: Iterable[Any],
    scores: str | Iterable[Mapping[str, Any] | ScoreRequest] = "low_loss",
    *,
    cache_block_outputs: bool = True,
    device: torch.device | str | None = None,
    store: TensorStore | None = None,
    weights: str | Path | None = None,
    token_masks: Iterable[Tensor | None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Scores:
    """Score a plain PyTorch model with one of its blocks at a time on the compute device.

    The scores are those of `attach` around a loop over the batches, with a step after each. Collective over the world
    where torch.distributed is initialised: each rank is a data-parallel replica, and brings equally many batches.

    With ``cache_block_outputs`` each block runs once for each batch, on what the block before returned. All other
    arguments (masks, rotary tables) are those that the model passes to this block; they are taken from one pass in
    which blocks do not run. Without it, each block's inputs come from a pass through the blocks before: right for every
    model, at the price of running the first block as often as there are blocks.

    What is scored outside of the blocks, such as the final norm, is measured in a pass of its own, which ends when
    each of those modules has been reached. An iterative score with more iterations than there are batches goes over
    each block's stored inputs several times.

    Args:
        model: A model with the module names of the Llama family or of BERT; or a Hugging Face checkpoint directory,
            whose weights are then read block by block and never all in memory.
        blocks: The model's blocks in order: modules, a list module, or its dotted name; None takes the layers in
            which scores are known.
        batches: For each step a tensor, or a tuple, list or mapping of the model's arguments; shapes may differ.
        scores: Name of a recipe, or the scores themselves as for `attach`.
        cache_block_outputs: See above.
        device: The compute device; that of the model if not given. Weights that are elsewhere come to it and go.
        store: Where inputs wait: `megascore.capture.HostStore` (the default), ``DeviceStore`` or ``SpoolStore``.
        weights: Checkpoint directory of weights that the model has on the meta device.
        token_masks: For padded batches, which tokens of each count: bool [B, S], True for those that do.
        metadata: JSON-able entries for the score file.

    Raises:
        ConfigError: unknown scores, or such as only a job can measure; iterations that are no multiple of the number
            of batches, one tensor in place of batches, or a device that is not there.
        DataError: no batches, other numbers of them on other ranks, or a spool folder that is full or damaged.
        ModelError: no such blocks, or blocks that are not reached as they are given; a checkpoint that does not fit;
            or, with ``cache_block_outputs``, a model for which that gives something else than a full pass.
    """
    requests = resolve_scores(scores)
    refuse_needing_job(requests, "score_blockwise")
    _warn_of_lone_processes()
    agree("looking at the batches", lambda: refuse_single_tensor(batches))
    if isinstance(model, (str, Path)):
        folder = model
        weights = folder if weights is None else weights
        model = agree("building the model", lambda: empty_model(folder))
    own_model = model
    view = agree("looking at the model", lambda: view_of(own_model))
    if not isinstance(view, PlainModelView):
        raise ConfigError("score_blockwise takes plain PyTorch models; use attach for a Megatron-Core model.")
    masks = None if token_masks is None else list(token_masks)
    agree("looking at the metadata", lambda: _check_metadata(metadata))
    options = BlockwiseOptions(cache_block_outputs, device, store, weights, masks, dict(metadata or {}))
    return score_blocks(view, view.blocks if blocks is None else blocks, list(batches), requests, options)


def _warn_of_lone_processes() -> None:
    """Warn where torchrun started several processes that know nothing of each other: each would score by itself."""
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_started > 1 and not dist.is_initialized():
        warnings.warn(
            f"{num_started} processes were started (WORLD_SIZE), but torch.distributed is not initialized here: this "
            "one scores what it sees by itself, and takes itself for the only one. Call "
            "torch.distributed.init_process_group() first, or start one process.",
            stacklevel=3,
        )


def _part_of(model: nn.Module | Sequence[nn.Module], part: str | None) -> nn.Module | Sequence[nn.Module]:
    wanted: Any = model
    # What is no model is told by what looks at it next.
    if isinstance(wanted, nn.Module):
        return part_of(wanted, part)
    if isinstance(wanted, Sequence) and all(isinstance(chunk, nn.Module) for chunk in wanted):
        return [part_of(chunk, part) for chunk in wanted]
    return model


def view_of(model: nn.Module | Sequence[nn.Module]) -> ModelView:
    """Return a model as scoring sees it.

    Raises:
        ConfigError: it is no model.
        ModelError: it is of no known kind.
    """
    wanted: Any = model
    given = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    if not given or not all(isinstance(module, nn.Module) for module in given):
        raise ConfigError(
            f"the model is {model!r}: expected a torch.nn.Module, or the list of the virtual-pipeline chunks of one."
        )
    chunks: list[nn.Module] = given
    if _is_megatron(chunks):
        from megascore.mcore.sites.view import MegatronModelView

        return MegatronModelView(chunks)
    if len(chunks) != 1:
        raise ConfigError(f"attach was given {len(chunks)} modules that are not Megatron-Core's: give one model.")
    return PlainModelView(chunks[0])


def _check_weights(view: ModelView) -> None:
    """Refuse a model that can't run as it is."""
    for place in view.places:
        if any(parameter.is_meta for parameter in place.module.parameters()):
            if has_offload_hook(place.module):
                raise ModelError(
                    f"{place.local_name} has its weights only while it runs: accelerate takes them away (a device "
                    f"map, cpu_offload or disk_offload). Call {REMOVE_HOOKS}, and attach() if the whole model is in "
                    "memory then; or use megascore.score_blockwise with weights=FOLDER, the checkpoint directory, "
                    "which keeps one block in memory and needs no hooks removed."
                )
            raise ModelError(
                f"{place.local_name} has no weights in memory (they are on the meta device: not loaded yet, or taken "
                "away by a device map): load the whole model before attach(), or use megascore.score_blockwise, which "
                "keeps one block in memory."
            )


def _check_metadata(metadata: Mapping[str, Any] | None) -> None:
    """Refuse entries that would stand in a score file where what the run has counted belongs, or can't be written."""
    taken = sorted(COUNTED & set(metadata or {}))
    if taken:
        raise ConfigError(
            f"metadata has {', '.join(taken)}, which the run writes itself: give your entries other names."
        )
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metadata can't be written as JSON: {error}.") from error


def _is_megatron(chunks: Sequence[nn.Module]) -> bool:
    """Tell whether any module is Megatron-Core's, without importing it: a model made with it has imported it."""
    megatron = sys.modules.get("megatron.core.transformer.module")
    return megatron is not None and any(
        isinstance(module, megatron.MegatronModule) for chunk in chunks for module in chunk.modules()
    )
