"""New weights on their way from the ranks that have them to the folder of the smaller model, and across a kill.

A folder beside the output has a file for each layer and rank that wrote something, and one that says which layers are
done. It is seen by all machines, as the output is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megascore.errors import PlanError
from megascore.files.json_text import parse_json
from megascore.files.whole import write_whole

__all__ = ["WorkFolder"]

PROGRESS = "compensation.json"


class WorkFolder:
    """The folder of one output."""

    def __init__(self, output: str | Path) -> None:
        """Name it; nothing is made yet."""
        target = Path(output)
        self.path = target.with_name(f"{target.name}.compensation")

    def begin(self, identity: Mapping[str, Any]) -> int:
        """Make the folder, or find it, and return how many layers are done. On one rank.

        Raises:
            PlanError: it is of another model, plan, text or method.
        """
        path = self.path / PROGRESS
        if not path.is_file():
            self.save_progress(identity, 0, [])
            return 0
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            saved, layers = dict(found["identity"]), int(found["layers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{path} can't be read ({error!r}): take {self.path} away to begin again.") from error
        other = [key for key in {**identity, **saved} if identity.get(key) != saved.get(key)]
        if other:
            raise PlanError(
                f"{self.path} is what a stopped compensation has left, of another "
                f"{', '.join(sorted(other))}: take it away, or go on with what it was begun with."
            )
        return layers

    def save_progress(self, identity: Mapping[str, Any], layers: int, facts: list[dict[str, Any]]) -> None:
        """Say that so many layers are done. On one rank, when all others have written theirs."""
        content = {"identity": dict(identity), "layers": layers, "projections": facts}
        write_whole(self.path / PROGRESS, json.dumps(content, sort_keys=True).encode())

    def facts(self) -> list[dict[str, Any]]:
        """Return what is known of the projections of layers that are done."""
        found: list[dict[str, Any]] = parse_json((self.path / PROGRESS).read_text(encoding="utf-8"))["projections"]
        return found

    def write(self, layer: int, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what a rank has of a layer, by the names of the parent's tensors."""
        if tensors:
            on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_whole(self.path / f"layer-{layer:05d}-rank-{rank:05d}.safetensors", save(on_cpu))

    def read(self, name: str, layer: int) -> Tensor | None:
        """Return a tensor of a layer that is done; None where it keeps its old values.

        Raises:
            PlanError: a file is damaged.
        """
        for path in self._files(layer):
            try:
                with safe_open(path, framework="pt") as file:
                    if name in file.keys():
                        tensor: Tensor = file.get_tensor(name)
                        return tensor
            except (SafetensorError, OSError) as error:
                raise PlanError(f"{path} can't be read ({error}): take {self.path} away to begin again.") from error
        return None

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self, layer: int) -> Iterator[Path]:
        yield from sorted(self.path.glob(f"layer-{layer:05d}-rank-*.safetensors"))
