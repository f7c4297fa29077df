"""Optional paths: abilities that change, or are lost, where a package or a GPU is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megascore.environment.packages import Package

__all__ = ["OptionalPath", "grouped_experts", "optional_paths"]

MIN_GROUPED_GEMM_TE = (1, 9)
"""The first Transformer Engine whose grouped linear layers Megatron-Core uses."""
FIRST_WITHOUT_GROUPED_MLP = (0, 17)
"""The first megatron-core whose experts no longer take the package grouped_gemm."""


@dataclass(frozen=True)
class OptionalPath:
    """Something that megascore does in another way, or not at all, where a package or a GPU is missing."""

    name: str
    is_on: bool
    why: str
    """What makes it so, and where it is off, what happens instead."""


def optional_paths(packages: Mapping[str, Package], *, has_gpu: bool, has_nccl: bool) -> Iterator[OptionalPath]:
    """Yield every optional path, on or off."""
    megatron, engine, apex = packages["megatron-core"], packages["Transformer Engine"], packages["apex"]
    no_gpu = "there is no GPU"

    def needs(name: str, *wanted: Package, gpu: bool, on: str, instead: str) -> OptionalPath:
        missing = [package.why_not for package in wanted if not package.works] + (
            [] if has_gpu or not gpu else [no_gpu]
        )
        return OptionalPath(name, not missing, on if not missing else f"{', '.join(missing)}: {instead}")

    yield needs(
        "Megatron-Core models",
        megatron,
        gpu=False,
        on="'megascore score', and attach on Megatron models in any parallel layout",
        instead="only attach on plain Hugging Face models (pip install 'megascore[megatron]')",
    )
    instead_of_gpu = "Megatron-Core's own modules run on the CPU, and ranks talk over gloo"
    on_cpu = "a GPU is used; run.device=cpu asks for it" if has_gpu else megatron.why_not
    yield OptionalPath(
        "CPU stand-in",
        megatron.works and not has_gpu,
        instead_of_gpu if megatron.works and not has_gpu else on_cpu,
    )
    nccl = "ranks talk over it" if has_nccl else "this torch was built without it"
    yield OptionalPath("NCCL", has_gpu and has_nccl, nccl if has_gpu else f"{no_gpu}: ranks talk over gloo")
    yield needs(
        "norms fused into linear layers",
        megatron,
        engine,
        gpu=True,
        on="'megascore score' builds Transformer Engine's layers; their norms are sites, computed again for the scores",
        instead="'megascore score' builds Megatron's local layers with PyTorch's norms, which are sites too",
    )
    yield needs(
        "apex's fused norms",
        apex,
        gpu=True,
        on="your own models can have them; each is a site",
        instead="models are built with other norms, which are sites too",
    )
    yield needs(
        "fused attention for context parallelism",
        megatron,
        engine,
        gpu=True,
        on="Transformer Engine's",
        instead="keys and values are gathered instead: exact, and no faster than one rank",
    )
    yield grouped_experts(packages, has_gpu)
    yield needs(
        "loading with Megatron-Bridge",
        packages["Megatron-Bridge"],
        gpu=False,
        on="its AutoBridge takes the models that the built-in loader doesn't know",
        instead="the built-in loader only",
    )
    yield needs(
        "tokenizers of Hugging Face",
        packages["transformers"],
        gpu=False,
        on="text is tokenized with the model's own tokenizer",
        instead="no text can be read (pip install 'megascore[huggingface]')",
    )


def grouped_experts(packages: Mapping[str, Package], has_gpu: bool) -> OptionalPath:
    """Return whether experts can be one grouped product: by Transformer Engine, or an older package."""
    name, instead = "grouped GEMM experts", "experts run one after the other, with the same scores"
    engine, legacy, megatron = packages["Transformer Engine"], packages["grouped_gemm"], packages["megatron-core"]
    if not has_gpu:
        return OptionalPath(name, False, f"there is no GPU: {instead}")
    if not megatron.works:
        return OptionalPath(name, False, megatron.why_not)
    if engine.works and engine.release >= MIN_GROUPED_GEMM_TE:
        return OptionalPath(name, True, "Transformer Engine's grouped linear layers")
    if legacy.works and megatron.release < FIRST_WITHOUT_GROUPED_MLP:
        return OptionalPath(name, True, "Megatron's GroupedMLP; channels inside an expert are computed again")
    return OptionalPath(name, False, f"{engine.why_not}, {legacy.why_not}: {instead}")
