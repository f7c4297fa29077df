"""Models that a function of the user's returns."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megascore.config import ParallelConfig
from megascore.errors import ConfigError, LayoutError, ModelError
from megascore.mcore.models.arguments import chunk_arguments
from megascore.mcore.models.empty_layers import on_device

__all__ = ["ProviderBuilder", "ProviderWeights", "checked_chunks", "find_function"]


def find_function(provider: str) -> Callable[..., Any]:
    """Import the function that ``package.module:function`` names.

    Raises:
        ConfigError: it is written otherwise, or there is no such module or function.
    """
    module_name, colon, name = provider.partition(":")
    if not colon or not module_name or not name.isidentifier():
        raise ConfigError(f"model.provider is '{provider}': expected package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model.provider={provider}: module {module_name} cannot be imported: {error}. It must lie on Python's "
            "path: install it, or set PYTHONPATH."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no such name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(f"model.provider={provider}: expected a function '{name}' in {module_name}, found {found}.")
    return function  # type: ignore[no-any-return]


class ProviderBuilder:
    """Calls the function on every rank, with what it declares of Megatron's own ``model_provider``.

    That is ``pre_process``, ``post_process`` and ``vp_stage``; then it is called once for each chunk of this rank. It
    may also declare ``parallel`` (the job's `ParallelConfig`), ``dtype``, ``device`` and ``max_sequence_length``.
    """

    vocab_size = None
    whole_because = None

    def __init__(self, provider: str) -> None:
        """Import the function, and look at what it declares.

        Raises:
            ConfigError: there is none, or it needs arguments that it would not be given.
        """
        self.name = provider
        self._function = find_function(provider)
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._names = {parameter.name for parameter in parameters}
        needed = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and parameter.name not in (*PER_CHUNK, *PER_JOB)
        ]
        if needed:
            raise ConfigError(
                f"model.provider={provider} needs {', '.join(needed)}: it is given those that it declares of "
                f"{', '.join((*PER_CHUNK, *PER_JOB))}."
            )

    def identity(self) -> Mapping[str, Any]:
        """Return the function's name: what it builds is its own affair."""
        return {"provider": self.name}

    def check(self, parallel: ParallelConfig) -> None:
        """Check what can be known before the call.

        Raises:
            LayoutError: ``parallel.pipeline_layers`` is given, which the function decides.
        """
        if parallel.pipeline_layers is not None:
            raise LayoutError("parallel.pipeline_layers has no effect with model.provider, which builds the stages.")

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Call the function, for each chunk where it declares one of what chunks differ in.

        Raises:
            ModelError: what it returns is no model of this layout.
        """
        job = {"parallel": parallel, "dtype": dtype, "device": device, "max_sequence_length": max_sequence_length}
        per_chunk = self._takes_all or not self._names.isdisjoint(PER_CHUNK)
        returned: list[Any] = []
        for chunk in range(parallel.virtual_pipeline if per_chunk else 1):
            value = self._function(**self._declared({**job, **chunk_arguments(parallel, chunk)}))
            returned.extend(value if isinstance(value, (list, tuple)) else [value])
        return checked_chunks(returned, parallel, dtype, device, f"model.provider={self.name}")

    def _declared(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if self._takes_all or name in self._names}


PER_CHUNK = ("pre_process", "post_process", "vp_stage")
PER_JOB = ("parallel", "dtype", "device", "max_sequence_length")


def checked_chunks(
    returned: Sequence[Any], parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, where: str
) -> list[nn.Module]:
    """Unwrap a model that was built elsewhere, and check that it is one of this layout.

    Args:
        returned: Its chunks on this rank, wrapped in Megatron's wrappers or not.
        parallel: The layout that it should have.
        dtype: The type that its matrices should have.
        device: Where it goes.
        where: What returned it, for errors.

    Returns:
        Its chunks on ``device``, in evaluation mode.

    Raises:
        ModelError: other things than Megatron models, another number of them, or built for another layout or type.
    """
    chunks = []
    for value in returned:
        module = _unwrapped(value) if isinstance(value, nn.Module) else value
        config = getattr(module, "config", None)
        if not isinstance(module, nn.Module) or not isinstance(config, TransformerConfig):
            raise ModelError(
                f"{where} returned {type(value).__name__}: expected a Megatron-Core model, or a list of its "
                "virtual-pipeline chunks."
            )
        if not hasattr(module, "set_input_tensor") or not hasattr(module, "post_process"):
            raise ModelError(
                f"{where} returned {type(module).__name__}, which Megatron's pipeline cannot run: expected a language "
                "model such as GPTModel, with pre_process, post_process and set_input_tensor."
            )
        _check_degrees(config, parallel, where)
        _check_dtype(module, dtype, where)
        chunks.append(on_device(module, device).eval())
    if len(chunks) != parallel.virtual_pipeline:
        raise ModelError(
            f"{where} returned {len(chunks)} chunks: expected {parallel.virtual_pipeline}, one for each of "
            "parallel.virtual_pipeline."
        )
    return chunks


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside of wrappers for mixed precision or data parallelism, which keep it as ``module``."""
    while not hasattr(module, "set_input_tensor") or not hasattr(module, "decoder"):
        inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _check_degrees(config: TransformerConfig, parallel: ParallelConfig, where: str) -> None:
    for field, axis in (
        ("tensor_model_parallel_size", "tensor"),
        ("pipeline_model_parallel_size", "pipeline"),
        ("context_parallel_size", "context"),
        ("expert_model_parallel_size", "expert"),
        ("sequence_parallel", "sequence"),
    ):
        built, asked = getattr(config, field), getattr(parallel, axis)
        if built != asked:
            raise ModelError(
                f"{where} returned a model with {field}={built}, but parallel.{axis}={asked}: build its "
                "TransformerConfig for the layout of the job."
            )


def _check_dtype(module: nn.Module, dtype: torch.dtype, where: str) -> None:
    # Vectors, such as the weights of norms, may be of another type than matrices.
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.dim() > 1}
    if dtypes and dtype not in dtypes:
        names = " and ".join(sorted(str(found).removeprefix("torch.") for found in dtypes))
        raise ModelError(
            f"{where} returned a model in {names}, but model.dtype={str(dtype).removeprefix('torch.')}: set "
            "model.dtype to the type of the model."
        )


@dataclass(frozen=True)
class ProviderWeights:
    """Weights that the function has put into the model itself."""

    whole_because = "the function in model.provider puts all weights into it itself"

    builder: ProviderBuilder
    known_as: str | None
    """What the user says of them (``model.fingerprint``)."""

    def check(self) -> None:
        """There is nothing to check."""

    def load(self, chunks: Sequence[Any]) -> int:
        """Leave them as they are."""
        return 0

    def load_layer(self, chunk: nn.Module, layer: nn.Module) -> int:
        """Nothing could be loaded."""
        raise AssertionError(self.whole_because)

    def fingerprint(self) -> str:
        """Return what the user says of them: nothing else tells where the function has them from."""
        return self.known_as or f"not known: made by {self.builder.name}"
