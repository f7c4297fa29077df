"""Running micro-batches forward and backward, for scores that are made of gradients of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.errors import ModelError
from megascore.hooks.taylor import TaylorHook
from megascore.mcore.pipeline.schedule import MicroBatch, empty_hidden_states, forward_step, output_layers
from megascore.mcore.pipeline.token_losses import loss_gradient
from megascore.parallel.comm import agree, world_rank
from megascore.runs.finiteness import has_bad_token, not_finite
from megascore.runs.scoring_run import ScoringRun
from megascore.sites.site import Site
from megascore.sites.targets import PlaceKind

__all__ = ["GradientPasses"]


class GradientPasses:
    """Feeds the hooks of a run that need the gradient of each sample's loss at the places where they are.

    Each micro-batch goes forward and back through the pipeline alone, so that stages wait for one another; weights get
    no gradients. Beside the model there are in memory the activations of one micro-batch that its backward pass needs.
    """

    def __init__(self, chunks: Sequence[Any], run: ScoringRun) -> None:
        """Find the hooks. Not collective.

        Args:
            chunks: The virtual-pipeline chunks of this rank, on which the run's hooks are.
            run: The run.
        """
        self._chunks = chunks
        self._scoring = run
        self._device: torch.device = next(chunks[0].parameters()).device
        self._sites = [site for site in run.sites if isinstance(site.hook, TaylorHook)]
        self._num_calls: dict[str, int] = {}
        self._spoiled: dict[str, Tensor] = {}
        """By site, in the order in which they run, whether an activation that counts was not finite: [] bool."""

    @classmethod
    def of(cls, chunks: Sequence[Any], run: ScoringRun) -> GradientPasses | None:
        """Return what feeds a run's hooks, or None where none needs gradients: the same on all ranks."""
        if not any(issubclass(request.definition.hook, TaylorHook) for request in run.requests):
            return None
        return cls(chunks, run)

    def run(self, micro_batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
        """Run micro-batches, and give the hooks what they bring.

        Collective over tensor, context and pipeline ranks, with the same micro-batches, over the ranks that exchange
        tokens, with equally many; and over the world, to tell what went wrong.

        Args:
            micro_batches: Token numbers, [B, S] int64 each, whole sequences.
            masks: Which tokens of each count, [B, S] bool each, best in host memory; None counts all.

        Raises:
            ModelError: an activation is not finite; or no gradient comes to a place, or more than one, as what the
                model does there can't be scored so. Its rank tells which one.
            RankFailure: so it is on another rank.
        """
        self._num_calls, self._spoiled = dict.fromkeys((site.key for site in self._sites), 0), {}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._scoring.paused(),
            output_layers(self._chunks, run=True),
            _frozen_weights(self._chunks),
        ):
            for number, tokens in enumerate(micro_batches):
                self._run((tokens, None if masks is None else masks[number]))
        agree("looking at the gradients", lambda: self._check(len(micro_batches)))

    def _run(self, micro_batch: MicroBatch) -> None:
        """Run one micro-batch through all chunks, and back."""
        ran: list[tuple[Tensor | None, Tensor, Tensor | None]] = []
        with self._caught(micro_batch[1]):
            for number, chunk in enumerate(self._chunks):
                ran.append(self._forward(number, chunk, micro_batch))
            while ran:
                _backward(*ran.pop())

    def _forward(self, number: int, chunk: Any, micro_batch: MicroBatch) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Run a chunk; return what it was given from another rank, what it returns, and the gradient of that if known.

        The gradient is known of the logits alone.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        given = None
        if not chunk.pre_process:
            given = empty_hidden_states(chunk.config, tuple(micro_batch[0].shape), self._device)
            dist.recv(given, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
            chunk.set_input_tensor(given.requires_grad_())
        with _starting_graphs(chunk):
            output, _ = forward_step(iter([micro_batch]), chunk, device=self._device, compute_loss=False, run=None)
        if given is not None:
            chunk.set_input_tensor(None)
        is_last = number == len(self._chunks) - 1 and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        if is_last:
            vocab_size = getattr(chunk, "vocab_size", None)
            return given, output, loss_gradient(output.detach(), *micro_batch, vocab_size)
        dist.send(output.detach().contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
        return given, output, None

    @contextmanager
    def _caught(self, mask: Tensor | None) -> Iterator[None]:
        """Give hooks the activation and the gradient of what runs inside."""
        own_mask = None if mask is None else mask.to(self._device, non_blocking=True)
        with ExitStack() as handles:
            for site in self._sites:
                handle = site.place.module.register_forward_hook(self._catch(site, own_mask), with_kwargs=True)
                handles.callback(handle.remove)
            yield

    def _catch(self, site: Site, mask: Tensor | None) -> Any:
        hook = site.hook
        assert isinstance(hook, TaylorHook)
        of_layer = site.place.kind is PlaceKind.LAYER

        def behind_forward(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            inputs, first_output = site.place.read(args, dict(kwargs), output)
            differentiated = first_output if of_layer else inputs
            # Not where a recomputing layer runs first: its second run, inside of the backward pass, is caught.
            if not differentiated.requires_grad:
                return
            activation = first_output.detach() - inputs.detach() if of_layer else inputs.detach()
            own_mask = None if mask is None else site.place.local_mask(mask, activation)
            # Told by the activations: behind them every gradient of the model is as bad.
            is_bad = has_bad_token(activation, own_mask)
            self._spoiled[site.key] = is_bad | self._spoiled.get(site.key, False)

            def behind_backward(gradient: Tensor) -> None:
                with torch.no_grad():
                    self._num_calls[site.key] += 1
                    hook.observe_gradient(activation, gradient, own_mask)

            register: Any = differentiated.register_hook
            register(behind_backward)

        return behind_forward

    def _sites_as_they_run(self) -> list[Site]:
        by_key = {site.key: site for site in self._sites}
        return [by_key[key] for key in self._spoiled]

    def _check(self, expected: int) -> None:
        bad = next((site for site in self._sites_as_they_run() if bool(self._spoiled[site.key])), None)
        if bad is not None:
            score = f"{bad.target}/{bad.requests[0].method}"
            raise not_finite(self._scoring.num_steps, bad.place.name, world_rank(), score)
        wrong = [f"{key} has {number}" for key, number in self._num_calls.items() if number != expected]
        if wrong:
            raise ModelError(
                f"{expected} micro-batch(es) ran backward, but {'; '.join(wrong)} gradient(s): the model does not pass "
                "gradients on there. Score by a method without gradients, such as l2_norm or block_similarity."
            )


def _backward(given: Tensor | None, output: Tensor, gradient: Tensor | None) -> None:
    """Run a chunk backward, from the gradient that the next rank sends where none is known, and send on its own."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if gradient is None:
        gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
        dist.recv(gradient, src=parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    # Where the graph is broken, the places that get no gradient are named at the end, on all ranks.
    if output.requires_grad:
        torch.autograd.backward(output, gradient)
    if given is not None:
        # Zeros where nothing of it counted.
        sent = torch.zeros_like(given) if given.grad is None else given.grad
        dist.send(sent.contiguous(), dst=parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)


@contextmanager
def _starting_graphs(chunk: Any) -> Iterator[None]:
    """Let gradients begin at the embeddings, as no weight asks for one."""
    if not chunk.pre_process:
        yield
        return
    handle = chunk.embedding.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen_weights(chunks: Sequence[Any]) -> Iterator[None]:
    trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
