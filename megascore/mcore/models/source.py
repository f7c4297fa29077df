"""The source of a job's model: a builder, and weights that fill what it has built.

A job talks to `ModelSource` only. Everything about a model that can be found out without building it is found when the
source is made and checked, on every rank and without collectives, so that ranks can agree before anything long starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megascore.config import ParallelConfig
from megascore.errors import DataError

__all__ = ["Builder", "ModelSource", "Weights"]

logger = logging.getLogger(__name__)


class Builder(Protocol):
    """Makes a model without weights."""

    @property
    def name(self) -> str:
        """What the model is called in reports."""

    @property
    def vocab_size(self) -> int | None:
        """Tokens that it has; None where only the built model knows."""

    @property
    def whole_because(self) -> str | None:
        """Why its layers cannot be built empty (see `built_empty`); None where they can."""

    def identity(self) -> Mapping[str, Any]:
        """Return what tells this model from others of the same weights, as plain values. Not collective."""

    def check(self, parallel: ParallelConfig) -> None:
        """Check that the model splits so. Not collective.

        Raises:
            LayoutError: it does not.
        """

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Build the chunks of this rank without weights, in evaluation mode.

        Inside a `parallel_world`, on every rank; collective over the pipeline stages where embeddings are tied.

        Raises:
            LayoutError: the model does not split so.
            ModelError: it cannot be built, or is shorter than ``max_sequence_length``.
        """


class Weights(Protocol):
    """Fills a model that was built. `check` comes first."""

    @property
    def whole_because(self) -> str | None:
        """Why they cannot be read one layer at a time; None where they can."""

    def check(self) -> None:
        """Check that they are complete, as far as that can be known without reading them. Not collective.

        Raises:
            ModelError: weights are missing, damaged, or of another model.
        """

    def load(self, chunks: Sequence[Any]) -> int:
        """Fill the chunks of this rank, but for parameters on the meta device; return bytes read. On every rank.

        Raises:
            ModelError: weights are of another model, or a file has gone or changed since it was checked.
        """

    def load_layer(self, chunk: Any, layer: Any) -> int:
        """Fill one layer of a chunk, which has memory for its parameters; return bytes read. Not collective.

        Only where nothing is in `whole_because`.

        Raises:
            ModelError: a file has gone or changed since it was checked.
        """

    def fingerprint(self) -> str:
        """Return what tells these weights from others."""


@dataclass(frozen=True)
class ModelSource:
    """A model as the config names it: called in this order, `check`, `build`, `load`; a dry run only builds."""

    builder: Builder
    weights: Weights
    tokenizer: str | None
    """Hugging Face directory that has the model's own tokenizer; None where there is none."""

    @property
    def name(self) -> str:
        """What the model is called in reports."""
        return self.builder.name

    @property
    def vocab_size(self) -> int | None:
        """Tokens that it has; None where only the built model knows."""
        return self.builder.vocab_size

    @property
    def whole_because(self) -> str | None:
        """Why all layers must be there at once; None where each can be built empty and read by itself."""
        return self.builder.whole_because or self.weights.whole_because

    def identity(self) -> Mapping[str, Any]:
        """Return what tells this model from others of the same weights, as plain values. Not collective."""
        return self.builder.identity()

    def check(self, parallel: ParallelConfig) -> None:
        """Check all that can be known before the model is built: the layout, and the weights. Not collective."""
        self.builder.check(parallel)
        self.weights.check()

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Build the chunks of this rank, see `Builder`."""
        return self.builder.build(parallel, dtype, device, max_sequence_length)

    def load(self, chunks: Sequence[Any]) -> None:
        """Fill the chunks of this rank, see `Weights`."""
        num_bytes = self.weights.load(chunks)
        logger.info("read %.1f MB of weights of %s", num_bytes / 1e6, self.name)

    def load_layer(self, chunk: Any, layer: Any) -> None:
        """Fill one layer of a chunk, see `Weights`."""
        num_bytes = self.weights.load_layer(chunk, layer)
        logger.debug("read %.1f MB of weights of layer %d", num_bytes / 1e6, layer.layer_number - 1)

    def check_tokens(self, chunks: Sequence[Any], largest: int) -> None:
        """Check data against a model that only says how many tokens it has once it is built. Not collective.

        Raises:
            DataError: ``largest``, a token number in the data, is none of the model's.
        """
        vocab_size = getattr(chunks[0], "vocab_size", None)
        if isinstance(vocab_size, int) and largest >= vocab_size:
            raise DataError(
                f"the data has token {largest}, but the model {self.name} has {vocab_size} tokens: the tokenizer is "
                "not the model's."
            )

    def fingerprint(self) -> str:
        """Return what tells the weights from others. Reads a little of the files."""
        return self.weights.fingerprint()
