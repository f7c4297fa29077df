"""The inventory of a model: which of its modules have channels, and which of those nobody accounts for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from torch import Tensor, nn

__all__ = ["grouped", "is_norm", "joined", "norm_width", "unaccounted"]


def unaccounted(root: nn.Module, known: Collection[str]) -> list[tuple[str, str]]:
    """Return what in a module has channels, heads or experts, and is neither known nor inside of what is.

    Args:
        root: The module.
        known: Paths of modules and parameters in it, each of which accounts for all that is below it. Paths of what
            isn't there are allowed.

    Returns:
        Path and class of the outermost modules with nothing known inside; path and shape of single parameters.
    """
    modules = [part for path, module in root.named_modules() if path in known for part in module.modules()]
    weights = [weight for path, weight in root.named_parameters() if path in known]
    # By identity, as a module may be in a model under several names.
    return _look(root, "", {id(part) for part in (*modules, *weights)})[0]


def is_norm(name: str, module: nn.Module) -> bool:
    """Tell whether a module of this name is a norm, with weights or without, by the names that norms are given."""
    kind = type(module).__name__.lower()
    is_one = "norm" in kind or ("norm" in name.lower() and "identity" not in kind)
    return is_one and not list(module.children()) and all(weight.dim() == 1 for weight in module.parameters())


def norm_width(module: nn.Module) -> int | None:
    """Return the number of features that a norm normalizes together; None where the module does not tell."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, (tuple, list)) and shape else None


def joined(path: str, name: str) -> str:
    """Return the path of what has a name in a module, whose own path may be empty, as may the name."""
    return f"{path}.{name}" if path and name else path or name


def grouped(names: Iterable[str]) -> list[str]:
    """Return names without repetition; those that differ in the number of their layer alone come as one.

    >>> grouped(["decoder.layers.0.mlp: Mixer", "decoder.layers.1.mlp: Mixer", "head: Head"])
    ['decoder.layers.*.mlp: Mixer (2 layers)', 'head: Head']
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        layers[re.sub(r"(?<=layers\.)\d+", "*", name, count=1)].append(name)
    return [own[0] if len(own) == 1 else f"{shared} ({len(own)} layers)" for shared, own in layers.items()]


def _look(module: nn.Module, path: str, known: set[int]) -> tuple[list[tuple[str, str]], bool]:
    """Return what is unaccounted for in a module, and whether something in it is known."""
    if id(module) in known:
        return [], True
    found: list[tuple[str, str]] = []
    has_known = False
    for name, child in module.named_children():
        inside, knows = _look(child, joined(path, name), known)
        found += inside
        has_known = has_known or knows
    own = [(joined(path, name), weight) for name, weight in module._parameters.items() if weight is not None]
    if not has_known and not any(id(weight) in known for _, weight in own):
        return ([(path, type(module).__name__)] if found or _has_channels(path, module) else []), False
    # A scalar has no channels.
    unknown = [(name, weight) for name, weight in own if id(weight) not in known and weight.numel() > 1]
    return found + [(name, f"parameter {list(weight.shape)}") for name, weight in unknown], True


def _has_channels(path: str, module: nn.Module) -> bool:
    # Quantized layers may keep their weights in buffers.
    is_linear = isinstance(getattr(module, "in_features", None), int)
    weights = module._parameters.values()
    return (
        is_linear
        or is_norm(path.rpartition(".")[2], module)
        or any(weight is not None and weight.numel() > 1 for weight in weights)
    )
