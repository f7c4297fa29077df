"""Text as typed: YAML does not turn ``4711_3``, ``0010`` or ``on`` into something else where a key holds text."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

__all__ = ["layer_of_file", "layer_of_override", "text_keys"]

NULL = ("", "null", "~")
"""What stands for no value, as in YAML."""
STRING = "tag:yaml.org,2002:str"


def text_keys(schema: type) -> frozenset[tuple[str, str]]:
    """Return section and name of each key of a schema's sections that holds text, or text or nothing."""
    sections = {name: kind for name, kind in get_type_hints(schema).items() if dataclasses.is_dataclass(kind)}
    return frozenset(
        (section, name)
        for section, kind in sections.items()
        for name, type_ in get_type_hints(kind).items()
        if type_ in (str, str | None)
    )


def layer_of_file(content: str, keys: frozenset[tuple[str, str]]) -> DictConfig:
    """Return what a YAML text of sections holds, as OmegaConf has it, with the text of ``keys`` as it was typed.

    Raises:
        YAMLError: the text is no YAML.
    """
    root = yaml.compose(content, Loader=yaml.SafeLoader)
    for section, values in _items(root):
        for name, value in _items(values):
            if (section, name) in keys and _is_typed(value):
                # Quoted, it is text for every reader of YAML.
                value.tag, value.style = STRING, '"'
    layer = OmegaConf.create("" if root is None else yaml.serialize(root, allow_unicode=True))
    assert isinstance(layer, DictConfig)
    return layer


def layer_of_override(override: str, keys: frozenset[tuple[str, str]]) -> DictConfig:
    """Return what ``key=value`` holds; quotes around text are taken off, as in YAML.

    Raises:
        YAMLError: the value is no YAML, and the key holds no text.
    """
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    if (section, name) in keys and value not in NULL and value[0] not in "'\"":
        # Past YAML, which knows no bytes that are not UTF-8, and takes what follows a # for a comment.
        return OmegaConf.create({section: {name: value}})
    if name == "" and value.startswith("{"):
        return layer_of_file(f"{section}: {value}", keys)
    return OmegaConf.from_dotlist([override])


def _items(node: Any) -> list[tuple[str, Any]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _is_typed(node: Any) -> bool:
    """Tell whether a value stands without quotes, and is no null."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() not in NULL
