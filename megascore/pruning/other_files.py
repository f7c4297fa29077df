"""What comes along beside config.json and weights: tokenizer, templates, licences, code of the model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

__all__ = ["copy_other_files"]

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
MADE_ANEW = ("config.json", "megascore_prune.json")
LEFT_OUT = (".git", ".cache", ".gitattributes", "__pycache__")


def copy_other_files(source: Path, target: Path) -> None:
    """Copy all files of a folder that hold no weights, also those in its folders.

    Weights in other forms are left out with a warning; those of git and of caches, `LEFT_OUT`, are no part of a model.

    Raises:
        OSError: the system refuses.
    """
    weights = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if not path.is_file() or relative.parts[0] in LEFT_OUT or str(relative) in MADE_ANEW:
            continue
        if relative.name.endswith(WEIGHTS):
            weights.append(relative)
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    others = [str(path) for path in weights if path.suffix != ".safetensors" and not path.name.endswith(".index.json")]
    others += [str(path) for path in weights if path.suffix == ".safetensors" and len(path.parts) > 1]
    if others:
        logger.warning("Other weights of %s are not pruned and stay behind: %s", source, ", ".join(others[:5]))
