"""Programs of users: loops of their own, one block at a time, score files. Each runs in the folder of a case."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import megascore

INPUTS = Path("../../inputs")
VOCABULARY, LENGTH, BATCH_SIZE, NUM_STEPS = 100, 16, 4, 4
STOPPED_AFTER = 2
ALL_PLAIN_SCORES: list[dict[str, Any]] = [
    {"target": "ffn"},
    {"target": "ffn", "method": "independent_contribution"},
    {"target": "ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
    {"target": "attention_heads"},
    {"target": "kv_heads"},
    {"target": "hidden_size"},
    {"target": "hidden_size", "method": "layer_norm_contribution"},
    {"target": "layers"},
]


def load(name: str) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if name == "bert" else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(INPUTS / name, dtype=torch.float32)
    return model


def batches() -> list[dict[str, Tensor]]:
    """Two samples of the last batch are padded."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, LENGTH)
    made = [
        {
            "input_ids": torch.randint(VOCABULARY, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
        }
        for _ in range(NUM_STEPS)
    ]
    made[-1]["attention_mask"][2:, -5:] = 0
    return made


def attach_plain() -> None:
    """A Hugging Face model in a loop with masks: alone, or a replica on each rank."""
    rank, size = join()
    for name in ("llama", "bert"):
        model = load(name)
        with megascore.attach(model, scores=ALL_PLAIN_SCORES, metadata={"data": {"name": "made up"}}) as run:
            for batch in batches():
                own = {key: value[rank::size] for key, value in batch.items()}
                with torch.no_grad(), run.masked(own["attention_mask"]):
                    model(**own)
                run.step()
        run.finish().save(f"{name}.safetensors")
    scores = megascore.load_scores("llama.safetensors")
    print(list(scores), scores.unseen, scores["decoder/layers"])


def attach_recipe() -> None:
    """Recipe minitron on a model whose experts are not scored, then a second run on the same model."""
    for name in ("mixtral", "llama"):
        model = load(name)
        for recipe, file in (("minitron", "minitron"), (None, "again")):
            with megascore.attach(model, recipe, scores=None if recipe else [{"target": "layers"}]) as run:
                model(batches()[0]["input_ids"])
                run.step()
            run.finish({"loss": 1.5}).save(f"{name}-{file}.safetensors")


def own_loop_with_checkpoints() -> None:
    """Stopped by a signal in the first start, gone on with in the second."""
    rank, size = join()
    model, begun = load("llama"), Path("checkpoints").exists()
    identity = {"data": "made up", "weights": "llama"}
    with (
        megascore.attach(model, scores=ALL_PLAIN_SCORES) as run,
        megascore.checkpoints(run, "checkpoints", total_steps=NUM_STEPS, identity=identity) as saver,
        torch.no_grad(),
    ):
        for batch in islice(batches(), saver.step, None):
            model(batch["input_ids"][rank::size])
            run.step()
            if not begun and saver.step == STOPPED_AFTER and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            saver.after_step()
        run.finish().save("scores.safetensors")
        saver.finish()


def blockwise() -> None:
    """`score_blockwise` on a folder and on models in memory, fed in each way, with masks, spooled."""
    from megascore.capture import SpoolStore

    masks = [batch["attention_mask"].bool() for batch in batches()]
    twice = [
        {**entry, **({"iterations": 2 * NUM_STEPS} if "iterations" in entry else {})} for entry in ALL_PLAIN_SCORES
    ]
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "folder": (str(INPUTS / "llama"), {}),
        "memory": (load("llama"), {"scores": ALL_PLAIN_SCORES, "token_masks": masks}),
        "twice": (load("llama"), {"scores": twice}),
        "fresh": (load("llama"), {"scores": ALL_PLAIN_SCORES, "cache_block_outputs": False}),
        "spooled": (load("llama"), {"scores": ALL_PLAIN_SCORES, "store": SpoolStore("spool", memory_bytes=1000)}),
        "bert": (load("bert"), {"scores": ALL_PLAIN_SCORES, "token_masks": masks}),
    }
    for name, (model, options) in ways.items():
        megascore.score_blockwise(model, None, batches(), **options).save(f"{name}.safetensors")


def capture() -> None:
    """Inputs of a block, as they come out of the store."""
    from megascore.capture import capture_block_inputs

    calls = list(capture_block_inputs(load("llama"), "model.layers.2", batches()))
    tensors = {f"{number}.{name}": value for number, call in enumerate(calls) for name, value in named_tensors(call)}
    save_file(tensors, "inputs.safetensors")


def named_tensors(call: Any) -> list[tuple[str, Tensor]]:
    """Tensors of a block's arguments, by position and name, also inside of tuples."""
    given = {**{str(number): value for number, value in enumerate(call.args)}, **call.kwargs}
    flat = {}
    for name, value in given.items():
        for number, inner in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(inner, Tensor):
                flat[f"{name}.{number}"] = inner.clone().contiguous()
    return list(flat.items())


def read_scores() -> None:
    """Read the score files of ``others``, and write what was read."""
    for path in sorted(Path("others").glob("*.safetensors")):
        scores = megascore.load_scores(path)
        save_file(dict(scores), path.name)
        print(path.name, list(scores), scores.unseen, scores.metadata)


def join() -> tuple[int, int]:
    """Join the other ranks, if there are any; return this one's number and how many there are."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()
