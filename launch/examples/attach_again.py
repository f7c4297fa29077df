"""Two scoring runs on one model that has hooks of its own: python launch/examples/attach_again.py MODEL OUTPUT.

The second file is OUTPUT with "-heads" before its ending.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import megascore

SEQUENCE_LENGTH = 32


def watch_largest(model: nn.Module) -> list[Tensor]:
    """Put a hook of one's own on the model: the largest activation of each forward pass."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output.abs().max())

    model.get_submodule("model.norm").register_forward_hook(note)
    return seen


@torch.no_grad()
def main(checkpoint: str, output: str) -> list[Tensor]:
    """Score channels on one text and heads on another; return what the model's own hook saw."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).float().train()
    seen = watch_largest(model)
    generator = torch.Generator().manual_seed(0)
    code, prose = torch.randint(model.config.vocab_size, (2, 4, SEQUENCE_LENGTH), generator=generator)

    with megascore.attach(model, recipe="minitron", metadata={"data": {"name": "code"}}) as run:
        model(code)
        run.step()
    first = run.finish()
    first.save(output)
    # Its hooks are gone, and the model is in training mode again; the hook from above is still there.

    with megascore.attach(model, scores=[{"target": "kv_heads"}], metadata={"data": {"name": "prose"}}) as run:
        model(prose)
        run.step()
    path = Path(output)
    run.finish().save(path.with_stem(f"{path.stem}-heads"))
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder")
    parser.add_argument("output", metavar="OUTPUT", help="score file to write, the first of two")
    arguments = parser.parse_args()
    main(arguments.model, arguments.output)
