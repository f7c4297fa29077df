"""One scoring run over somebody's forward loop: hooks on, steps counted, results merged, hooks off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megascore.errors import CheckpointError, DataError, HookStateError
from megascore.hooks.statistics import State
from megascore.kernels.exact import is_recomputation, never_compiled
from megascore.parallel.comm import agree, collective_device, sum_in_place
from megascore.parallel.merge import Part, Plan, merge_over_world
from megascore.parallel.placed import PlacedHook
from megascore.process.closing import Closing
from megascore.runs.evaluation import Evaluation
from megascore.runs.finiteness import check_finite
from megascore.runs.results import Results, conclude
from megascore.scores.score_file import Scores
from megascore.sites.places import ModelView
from megascore.sites.requests import ScoreRequest
from megascore.sites.site import (
    REPLICATES,
    SCORE,
    Site,
    build_sites,
    check_places,
    groups_of,
    plan_of_scores,
    plan_of_states,
    present_requests,
)
from megascore.sites.step_groups import StepGroups, group_of_step

__all__ = ["ScoringRun"]


class ScoringRun(Closing):
    """Scores a model while it runs in its owner's loop.

    Building one is collective over the world: all ranks do it together, and so are `step` and `finish`. Forward
    passes in between communicate nothing on behalf of the scores. Where batches are padded, set the `token_mask`.

    The model is in evaluation mode meanwhile (dropout would be measured otherwise), and one that `torch.compile` made
    runs uncompiled, as compiled code calls no hooks that came later; leaving the ``with`` block, or `close`, takes the
    hooks off and restores the mode.
    """

    def __init__(
        self, view: ModelView, requests: Sequence[ScoreRequest], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Put hooks on the model. Collective over the world.

        Args:
            view: The model, seen through the adapter of its library.
            requests: What to score; `requests` of the run has those that the model has modules for.
            metadata: Entries to add to the score file's metadata, such as fingerprints.

        Raises:
            LayoutError: ranks disagree about the model, or a place has a parallel axis without a role.
            ModelError: a target matches no module on any rank.
        """
        self.view = view
        # What a rank alone can find wrong is told first, for some hooks gather their weights when they are built.
        agree("looking for the modules to score", lambda: check_places(view, requests))
        self.requests, self._not_scored = present_requests(view, requests)
        # What is made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.sites = agree("building the hooks", lambda: build_sites(view, requests))
        self.num_steps = 0
        self._metadata = dict(metadata or {})
        self._plan = plan_of_states(self.sites)
        self._score_plan = plan_of_scores(self.sites)
        self._token_mask: Tensor | None = None
        self._evaluation = Evaluation(view.modules)
        self._is_open = True
        self._is_paused = False
        self._order: dict[str, None] = {}
        """Keys of the sites, in the order in which they have run first."""
        self._warned_of_training = False
        self._handles: list[RemovableHandle] = []
        for site in self.sites:
            if site.hook.needs_job:
                continue  # No module sees it; the job feeds the hook.
            self._handles.append(site.place.module.register_forward_hook(self._forward_hook(site), with_kwargs=True))
        for follower in dict.fromkeys(site.place.mask_follower for site in self.sites):
            if follower is not None:
                self._handles.append(follower.follow(lambda: self._token_mask))

    def __enter__(self) -> ScoringRun:
        """Return the run itself; the hooks are on already.

        Raises:
            HookStateError: the run has been closed.
        """
        if not self._is_open:
            raise HookStateError("this run is closed, its hooks are off: attach to the model again for another one.")
        return super().__enter__()

    def close(self) -> None:
        """Take the hooks off and restore the model's mode; the statistics stay. Not collective; can be repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._evaluation.release()
        self._is_open = False

    @property
    def declared(self) -> tuple[Plan, Plan]:
        """The statistics, and the finished scores, of all sites in the world, by their keys."""
        return self._plan, self._score_plan

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens of the batch that runs now count, bool [B, S]; None (the default) counts all.

        Set it before each forward pass; what is set is copied. It is given for whole sequences, in the order of the
        batch, on every rank that runs the batch: tensor-, context- and pipeline-parallel ranks take their parts of it.
        A Hugging Face ``attention_mask`` will do. It changes what is counted, never what the model computes. Where
        routed experts are scored it travels with the tokens, so of ranks that exchange tokens all or none set one.

        Raises:
            DataError: it is not two-dimensional, or neither bool nor integer.
        """
        return self._token_mask

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        if mask is None:
            self._token_mask = None
            return
        if not isinstance(mask, Tensor):
            raise DataError(f"the token mask is a {type(mask).__name__}: expected a tensor, bool [samples, sequence].")
        if mask.dim() != 2 or mask.is_floating_point() or mask.is_complex():
            raise DataError(
                f"the token mask is {mask.dtype} {list(mask.shape)}: expected bool (or 0 and 1) [samples, sequence], "
                "True for each token that counts."
            )
        # A copy of its own, so that a place may remember what it made of it.
        self._token_mask = mask.detach().ne(0).to(self._device(), non_blocking=True)

    @contextmanager
    def masked(self, mask: Tensor | None) -> Iterator[None]:
        """Count only the tokens of ``mask`` in forward passes inside; see `token_mask`. Not collective."""
        before = self._token_mask
        self.token_mask = mask
        try:
            yield
        finally:
            self._token_mask = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of forward passes inside, such as those that a job runs for a score. Not collective."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def step(self) -> None:
        """End a step: ranks that hold parts of the same samples add them up.

        Collective over the world, in one all-reduce of a number that tells whether all is finite, and over the groups
        of the axes that split the sequence, one all-reduce for each such axis however many hooks there are. Every rank
        of such a group has run the same micro-batches.

        Raises:
            ModelError: on all ranks: what was measured is NaN or infinite; the first module of that kind is named.
        """
        self._settle()
        check_finite(self.sites, list(self._order), self.num_steps)
        self._fold()
        self.num_steps += 1

    def merged_states(self) -> dict[str, dict[str, Tensor]]:
        """Return a snapshot of the statistics of all sites in the world, in global terms, on the CPU of every rank.

        Collective over the world: what waits for other ranks is added up first, then one all-reduce. The accumulators
        are not changed.
        """
        self._settle()
        self._fold()
        merged = merge_over_world(self._plan, {site.key: site.part() for site in self.sites}, self._device())
        return {key: {name: value.cpu() for name, value in state.items()} for key, state in merged.items()}

    def restore(self, states: Mapping[str, State], num_steps: int) -> None:
        """Go on from a snapshot, also one that was taken on another layout.

        Collective over the world; nothing is changed on any rank if the snapshot doesn't fit on one.

        Args:
            states: What `merged_states` returned, the same on every rank.
            num_steps: Steps that it holds.

        Raises:
            CheckpointError: it is of other sites, sizes or weights; every difference is named.
        """
        agree("comparing the saved state with the model", lambda: self._check_states(states))
        for site in self.sites:
            site.restore(states[site.key])
        self.num_steps = num_steps

    def _check_states(self, states: Mapping[str, State]) -> None:
        missing = [f"{key} has no saved state" for key in self._plan if key not in states]
        foreign = [f"{key} is saved, but not scored in this run" for key in states if key not in self._plan]
        other = [text for site in self.sites if site.key in states for text in site.differences_from(states[site.key])]
        if missing or foreign or other:
            raise CheckpointError(f"the saved state is not of this run: {'; '.join([*missing, *foreign, *other])}.")

    def finish(self, metadata: Mapping[str, Any] | None = None, *, keep_statistics: bool = True) -> Scores:
        """Merge the statistics of all ranks, and return the same scores on every one.

        Collective over the world: two all-reduces. The accumulators are not changed, so a run can go on afterwards
        and be finished again.

        Args:
            metadata: Further entries for the score file, known only now, such as the loss.
            keep_statistics: Whether the file has what the scores were computed from, to be scored again and merged.

        Raises:
            HookStateError: no tokens have been seen, or iterations of an iterative score are missing.
            RankFailure: another rank could not compute its scores.
        """
        own = {**self._metadata, **(metadata or {})}
        return conclude(
            self.results(),
            self.view,
            self.requests,
            self.num_steps,
            own,
            self._not_scored,
            keep_statistics=keep_statistics,
        )

    def results(self) -> Results:
        """Merge the statistics of all ranks, and return what `finish` makes a score file of.

        Collective over the world: two all-reduces. The accumulators are not changed.

        Raises:
            HookStateError: iterations of an iterative score are missing.
            RankFailure: another rank could not compute its scores.
        """
        device = self._device()
        states = self.merged_states()
        own = agree("computing the scores", lambda: self._own_scores(states, device))
        scores = merge_over_world(self._score_plan, own, device)
        finished = {key: result[SCORE].cpu() for key, result in scores.items()}
        replicates = {key: result[REPLICATES].cpu() for key, result in scores.items() if REPLICATES in result}
        return Results(states, finished, groups_of(self._score_plan), replicates)

    def _own_scores(self, states: Mapping[str, State], device: torch.device) -> dict[str, Part]:
        """Return the finished scores of this rank's sites, as something to merge; none where no token was seen."""
        return {
            key: Part(
                site.hook.placement,
                site.score_statistics,
                {name: value.to(device) for name, value in found.items()},
            )
            for site in self.sites
            if int(states[site.key]["num_tokens"])
            for key, found in site.scores(states[site.key]).items()
        }

    def _fold(self) -> None:
        """Add what has come since the last time to the statistics of the group of this step."""
        of_hooks = [(site.groups, site.hook.state) for site in self.sites if site.groups is not None]
        StepGroups.fold(of_hooks, group_of_step(self.num_steps))

    def _settle(self) -> None:
        hooks = [site.hook for site in self.sites if isinstance(site.hook, PlacedHook) and site.hook.defers]
        waiting = {hook: hook.pending() for hook in hooks}
        groups = {name: group for hook in hooks for name, group in hook.settling_groups.items()}
        # Which hooks share a group follows from the layout alone, so it is the same on all ranks of the group.
        for name in sorted(groups):
            sum_in_place([t for hook in hooks if name in hook.settling_groups for t in waiting[hook]], groups[name])
        for hook, summed in waiting.items():
            hook.settle(summed)

    def _device(self) -> torch.device:
        """Device on which this rank's collectives run; ranks without sites still take part."""
        parameters = (parameter for chunk in self.view.modules for parameter in chunk.parameters())
        return next((parameter.device for parameter in parameters if not parameter.is_meta), collective_device())

    def _forward_hook(self, site: Site) -> Any:
        """Return what PyTorch calls after the module: reads its tensors and hands them to the site's hook."""

        @never_compiled
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # A function that was compiled with this hook calls it also when it is gone.
            if is_recomputation() or self._is_paused or not self._is_open:
                return
            if module.training:
                self._warn_of_training()
            with torch.no_grad():
                self._order.setdefault(site.key)
                inputs, first_output = site.place.read(args, kwargs, output)
                mask = self._token_mask
                local_mask = None if mask is None else site.place.local_mask(mask.to(inputs.device), inputs)
                site.hook.observe(inputs, first_output, local_mask)

        return observe

    def _warn_of_training(self) -> None:
        if not self._warned_of_training:
            self._warned_of_training = True
            warnings.warn(
                "the model was put in training mode while megascore scores it: dropout, where there is some, is "
                "measured too. Leave out model.train() in the loop; attach() has called model.eval().",
                stacklevel=2,
            )
