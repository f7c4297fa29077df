"""Names of a checkpoint's tensors: under which of its possible names a tensor is stored."""

from __future__ import annotations

from collections.abc import Container, Sequence

__all__ = ["BASE_MODEL", "stored_name"]

BASE_MODEL = "model"
"""Prefix of all names but that of the output layer, in the families whose config.json is known."""


def stored_name(names: Sequence[str], prefix: str, stored: Container[str]) -> str | None:
    """Return which of a tensor's possible names a checkpoint has; None if it has none of them.

    A base model is saved without its prefix (by ``AutoModel.save_pretrained``) or with it, and transformers loads
    either one into the model with an output layer, and back.

    Args:
        names: Names of the tensor in the whole model, the first choice first: several, if it is tied.
        prefix: What the base model is called in the model with an output layer; may be empty.
        stored: Names of the checkpoint's tensors.
    """
    forms = (form for name in names for form in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")))
    return next((form for form in forms if form in stored), None)
