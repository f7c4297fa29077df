"""Mistakes that a user's program can make. It runs in the folder of a case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from checkout_hooks import make_hooks
from checkout_programs import INPUTS, batches, load
from torch import nn

import megascore


def mistakes() -> None:
    """What a program of a user can do wrong: the class and the text of each error."""
    llama, tokens = load("llama"), batches()[0]["input_ids"]
    with megascore.attach(llama, recipe="minitron") as run:
        llama(tokens)
        run.step()
    scores = run.finish()
    scores.save("mine.safetensors")
    meta = copy.deepcopy(llama).to("meta")
    blocks = list(llama.model.layers)  # type: ignore[union-attr, arg-type]

    def attach_and_finish() -> None:
        with megascore.attach(llama, recipe="minitron") as run:
            run.finish()

    attempts: dict[str, Callable[[], Any]] = {
        "recipe": lambda: megascore.attach(llama, "minitrom"),
        "recipe and scores": lambda: megascore.attach(llama, "minitron", scores=[{"target": "ffn"}]),
        "target": lambda: megascore.attach(llama, scores=[{"target": "fnn"}]),
        "method": lambda: megascore.attach(llama, scores=[{"target": "layers", "method": "l2_norm"}]),
        "option": lambda: megascore.attach(llama, scores=[{"target": "ffn", "iterations": 3}]),
        "iterations": lambda: megascore.attach(llama, scores=[{"target": "ffn", "method": "iterative_contribution"}]),
        "nothing": lambda: megascore.attach(llama, scores=[]),
        "repeated": lambda: megascore.attach(llama, scores=[{"target": "ffn"}, {"target": "ffn"}]),
        "no such part": lambda: megascore.attach(llama, scores=[{"target": "experts"}]),
        "unknown model": lambda: megascore.attach(nn.Sequential(nn.Linear(2, 2))),
        "no model": lambda: megascore.attach("llama"),  # type: ignore[arg-type]
        "two models": lambda: megascore.attach([llama, llama]),
        "no weights": lambda: megascore.attach(meta, recipe="minitron"),
        "metadata": lambda: megascore.attach(llama, metadata={"num_tokens": 1}),
        "no data": attach_and_finish,
        "file there": lambda: scores.save("mine.safetensors"),
        "file missing": lambda: megascore.load_scores("nowhere.safetensors"),
        "foreign file": lambda: megascore.load_scores(INPUTS / "llama" / "model.safetensors"),
        "no safetensors": lambda: megascore.load_scores(INPUTS / "words.txt"),
        "key": lambda: scores["decoder.layers.0.mlp.linear_fc2/fnn"],
        "one tensor": lambda: megascore.score_blockwise(llama, None, tokens),
        "no batches": lambda: megascore.score_blockwise(llama, None, []),
        "no folder": lambda: megascore.score_blockwise("nowhere", None, [tokens]),
        "no such blocks": lambda: megascore.score_blockwise(llama, "model.blocks", [tokens]),
        "blocks in another order": lambda: megascore.score_blockwise(llama, blocks[::-1], [tokens]),
        "unfitting iterations": lambda: megascore.score_blockwise(
            llama, None, [tokens] * 2, [{"target": "ffn", "method": "iterative_contribution", "iterations": 3}]
        ),
        "hook of other channels": lambda: load_other_state(12, 9),
        "hook without data": lambda: make_hooks(nn.Linear(12, 7), nn.LayerNorm(12))["l2"][1].accumulate(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            print(f"{name}: no error")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")


def load_other_state(num_there: int, num_here: int) -> None:
    hooks = [make_hooks(nn.Linear(size, 7), nn.LayerNorm(12))["independent"] for size in (num_there, num_here)]
    for module, hook in hooks:
        x = torch.ones(2, 3, module.weight.shape[1])
        hook(module, (x,), module(x))
    hooks[1][1].load_state_dict(hooks[0][1].state_dict())
