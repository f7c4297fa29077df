"""Checks of a model and a sequence length against a parallel layout, and the layers of each pipeline chunk."""

from __future__ import annotations

from math import gcd

from megascore.config import ParallelConfig
from megascore.errors import LayoutError
from megascore.weights.architecture import Architecture

__all__ = [
    "check_divisible",
    "check_sequence_length",
    "exchanges_tokens",
    "layers_of_chunks",
]


def check_divisible(model: Architecture, parallel: ParallelConfig) -> None:
    """Check that every size that the layout splits can be split; a vocabulary that does not divide is padded.

    Raises:
        LayoutError: heads, KV heads, FFN, experts or layers do not divide; the text names the degrees that would do.
    """
    sizes = {"attention heads": model.num_heads, "KV heads": model.num_kv_heads}
    if model.experts is None or not all(model.experts.layers):
        sizes["FFN channels"] = model.ffn_size
    failing = [f"{size} {name}" for name, size in sizes.items() if size % parallel.tensor]
    if failing:
        would_do = ", ".join(str(degree) for degree in _divisors(gcd(*sizes.values())))
        raise LayoutError(
            f"parallel.tensor={parallel.tensor} does not divide the model's {' and '.join(failing)}; "
            f"tensor sizes that would do: {would_do}."
        )
    _check_experts(model, parallel)
    layers_of_chunks(model.num_layers, parallel)


def _check_experts(model: Architecture, parallel: ParallelConfig) -> None:
    if model.experts is None:
        if parallel.expert > 1 or parallel.expert_tensor > 1:
            raise LayoutError(
                f"parallel.expert={parallel.expert}, parallel.expert_tensor={parallel.expert_tensor}: "
                f"a {model.model_type} model has no experts; set both to 1."
            )
        return
    for axis, degree, size, what in (
        ("expert", parallel.expert, model.experts.num_experts, "experts"),
        ("expert_tensor", parallel.expert_tensor, model.experts.ffn_size, "channels of each expert"),
    ):
        if size % degree:
            would_do = ", ".join(map(str, _divisors(size)))
            raise LayoutError(
                f"parallel.{axis}={degree} does not divide the model's {size} {what}; sizes that would do: {would_do}."
            )


def exchanges_tokens(parallel: ParallelConfig) -> bool:
    """Whether experts are spread over data-parallel ranks, which then exchange tokens in every forward pass."""
    # Both cut the same row of ranks into blocks of neighbours: copies of the dense layers, and copies of the experts.
    return parallel.tensor * parallel.context % (parallel.expert * parallel.expert_tensor) != 0


def check_sequence_length(sequence_length: int, parallel: ParallelConfig) -> None:
    """Check that the layout can split sequences of this length.

    Raises:
        LayoutError: the length is not a multiple of what the layout splits it into.
    """
    # Context parallelism gives each rank two chunks, one from each end, to balance the causal mask.
    multiple = (parallel.tensor if parallel.sequence else 1) * (2 * parallel.context if parallel.context > 1 else 1)
    if sequence_length % multiple:
        below = sequence_length // multiple * multiple
        would_do = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise LayoutError(
            f"data.sequence_length={sequence_length} cannot be split by parallel.tensor={parallel.tensor}, "
            f"parallel.sequence={str(parallel.sequence).lower()}, parallel.context={parallel.context}: "
            f"expected a multiple of {multiple}, such as {would_do}."
        )


def layers_of_chunks(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Return how many layers each pipeline chunk has.

    Args:
        num_layers: Layers of the whole model.
        parallel: The layout; ``pipeline_layers`` gives the layers of each stage, else they are split evenly.

    Returns:
        ``[stage][virtual chunk]`` numbers of layers. Layers go round: first chunk of every stage, then the second.

    Raises:
        LayoutError: the layers cannot be split so.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    given = parallel.pipeline_layers
    if given is None:
        if num_layers % (stages * chunks):
            would_do = ", ".join(
                str(degree)
                for degree in _divisors(num_layers)
                # More than one chunk takes more than one stage.
                if num_layers % (degree * chunks) == 0 and (degree > 1 or chunks == 1)
            )
            raise LayoutError(
                f"the model's {num_layers} layers do not split evenly over parallel.pipeline={stages} x "
                f"parallel.virtual_pipeline={chunks}; pipeline sizes that would do: {would_do or 'none'}; "
                "or give the layers of each stage in parallel.pipeline_layers."
            )
        given = [num_layers // stages] * stages
    if sum(given) != num_layers or min(given) < chunks:
        raise LayoutError(
            f"parallel.pipeline_layers={given} sums to {sum(given)}: expected {num_layers}, the model's layers, "
            f"with at least {chunks} for each stage."
        )
    return [[layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)] for layers in given]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
