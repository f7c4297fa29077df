"""Differences between two folders of one case: tensors, metadata, exit codes, texts."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.benchmarks.two_checkouts.runner import CODES

__all__ = ["Differences", "compare", "diff_of_texts"]

MAY_DIFFER = re.compile(r"(megascore\.)?(metadata\.)?(created|versions\..*)|megascore\.sha256")
"""Entries of a score file's metadata that tell when and by what it was written."""
REPLACED: Sequence[tuple[str, str]] = (
    (r"(?m)^(host|process|started|updated|tokens_per_second|eta_seconds): .*$", r"\1: ..."),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?", "TIME"),
    # Shown where a run takes long enough for it.
    (r"(?m)^scoring: step .* left\n", ""),
    (r"[\d,.]+ tokens/s", "N tokens/s"),
    (r"took \d+:\d\d:\d\d", "took TIME"),
    (r"MB in [\d.]+ s", "MB in N s"),
    (r"'seconds': [\d.]+", "'seconds': N"),
    (r"process \d+ on \S+", "process N on HOST"),
)
"""Parts of texts that are another on every start, with what stands for them."""


@dataclass
class Differences:
    """What differs, as lines; empty where nothing does."""

    num_tensors: int = 0
    scores: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def compare(old: Path, new: Path, checkouts: Sequence[Path]) -> Differences:
    """Compare the folders of a case.

    Args:
        old: Folder of the first checkout.
        new: Folder of the second.
        checkouts: Both, whose paths in texts count as the same.
    """
    found = Differences()
    files = sorted({path.name for folder in (old, new) for path in folder.glob("*.safetensors")})
    for name in files:
        if not all((folder / name).exists() for folder in (old, new)):
            found.scores.append(f"{name}: only in {'old' if (old / name).exists() else 'new'}")
            continue
        (tensors, content), (other_tensors, other_content) = read(old / name), read(new / name)
        found.num_tensors += len(tensors)
        found.scores += [f"{name}: {line}" for line in differing_tensors(tensors, other_tensors)]
        found.metadata += [f"{name}: {line}" for line in differing_entries(content, other_content)]
    found.codes = list(differing_codes(old, new))
    for name in sorted({path.name for folder in (old, new) for path in folder.glob("*.rank*.txt")}):
        found.texts += diff_of_texts(old / name, new / name, checkouts)
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and flat metadata of a safetensors file, without the package."""
    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, dict(flat(metadata, ""))


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def differing_tensors(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[str]:
    """Name tensors that are not equal bit for bit."""
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            yield f"{name}: only in {'old' if name in old else 'new'}"
            continue
        a, b = old[name], new[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"{name}: {a.dtype} {list(a.shape)} in old, {b.dtype} {list(b.shape)} in new"
        elif not torch.equal(bits(a), bits(b)):
            off = (a.double() - b.double()).abs() / torch.maximum(a.double().abs(), b.double().abs())
            yield f"{name}: {int((a != b).sum())} of {a.numel()} differ, by up to {float(off.nan_to_num().max()):.1e}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing_entries(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        a, b = old.get(name, "nothing"), new.get(name, "nothing")
        if a != b and not MAY_DIFFER.fullmatch(name):
            yield f"{name}: {a!r} in old, {b!r} in new"


def differing_codes(old: Path, new: Path) -> Iterator[str]:
    codes, others = (json.loads((folder / CODES).read_text()) for folder in (old, new))
    for name in {**codes, **others}:
        if codes.get(name) != others.get(name):
            yield f"{name}: {codes.get(name)} in old, {others.get(name)} in new"


def diff_of_texts(old: Path, new: Path, checkouts: Sequence[Path]) -> list[str]:
    """Return a unified diff of what two starts have printed; of one that was not there, all of it."""
    before, after = (
        readable(path.read_text(), path.parent, checkouts).splitlines() if path.exists() else [] for path in (old, new)
    )
    names = (f"{folder}/{path.parent.name}/{path.name}" for folder, path in (("old", old), ("new", new)))
    return list(difflib.unified_diff(before, after, *names, n=1, lineterm=""))


def readable(text: str, folder: Path, checkouts: Sequence[Path]) -> str:
    """Return a text without what must differ: times, processes, the case's folder, and where a line of code stands."""
    text = text.replace(str(folder), "FOLDER").replace(str(folder.parents[1]), "RESULTS")
    for checkout in checkouts:
        text = re.sub(rf"{re.escape(str(checkout))}/[\w/]+\.py", "CODE", text)
        text = text.replace(f"{checkout}/", "CHECKOUT/")
    text = re.sub(r"CODE(\", line |:)\d+", r"CODE\1N", text)
    for pattern, replacement in REPLACED:
        text = re.sub(pattern, replacement, text)
    return text
