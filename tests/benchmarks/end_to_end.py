"""What scoring costs: the full minitron recipe on layers of Llama-3-8B's shape, scored pass / plain pass.

    python -m tests.benchmarks.end_to_end [--layers 2] [--tokens 512] [--dtype bfloat16] [--device cuda] [--repeats 15]

In one process, in turns, so that whatever else the machine does meets both; the ratio is the median over the rounds of
each round's own. On a CPU that others use too, ``--threads 1 --processor-time`` counts no time of theirs.

Where nvidia-modelopt is installed, its published hooks take turns too: on the same linear layers and norms, but not on
the layers themselves, for which it has none (``pip install nvidia-modelopt==0.47.0``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import megascore
from megascore.config import ParallelConfig
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.weights.huggingface.config import read_config
from tests.benchmarks.hooks import published_hooks

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    # The output layer isn't run, and a vocabulary has no part in the scores.
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
NUM_LAYERS = 32
WEIGHTS_OF_LAYER = 218_112_000
CPU_LAYERS, CPU_TOKENS, GPU_TOKENS = 2, 512, 8192
MEMORY_SHARE = 0.4
"""Part of the free memory that weights may take."""
RECIPES: dict[str, list[dict[str, Any]]] = {
    "minitron, all of it": [
        {"target": "ffn"},
        {"target": "attention_heads"},
        {"target": "hidden_size"},
        {"target": "layers"},
    ],
    "FFN channels alone": [{"target": "ffn"}],
    "attention heads alone": [{"target": "attention_heads"}],
    "hidden features alone": [{"target": "hidden_size"}],
    "layers alone": [{"target": "layers"}],
}
Setup = Callable[[], AbstractContextManager[Callable[[], None]]]
"""Puts hooks on, and gives what ends a step."""
Clock = Callable[[], float]


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def num_layers(device: torch.device, dtype: torch.dtype) -> int:
    fitting = int(free_bytes(device) * MEMORY_SHARE / (WEIGHTS_OF_LAYER * dtype.itemsize))
    return max(1, min(NUM_LAYERS if device.type == "cuda" else CPU_LAYERS, fitting))


def build(layers: int, dtype: torch.dtype, device: torch.device, length: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": layers}))
        chunks = build_gpt(read_config(folder).architecture, ParallelConfig(), dtype, device, length)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                is_norm = "norm" in name
                parameter.normal_(1.0 if is_norm else 0.0, 0.1 if is_norm else 0.02, generator=generator)
    return list(chunks)


def scoring(chunks: list[Any], scores: list[dict[str, Any]]) -> Setup:
    @contextmanager
    def enter() -> Iterator[Callable[[], None]]:
        with megascore.attach(chunks, scores=scores) as run:
            yield run.step

    return enter


def publishing(chunks: list[Any], module: Any) -> Setup:
    """The published norm-of-activations hook wherever the recipe has one."""

    def of_output(hook: Any) -> Callable[..., None]:
        return lambda norm, args, output: hook(norm, (output,), output)

    @contextmanager
    def enter() -> Iterator[Callable[[], None]]:
        handles = []
        for name, part in chunks[0].named_modules():
            if name.endswith(("mlp.linear_fc2", "self_attention.linear_proj")):
                handles.append(part.register_forward_hook(module.L2NormHook()))
            elif isinstance(part, (nn.RMSNorm, nn.LayerNorm)):
                handles.append(part.register_forward_hook(of_output(module.L2NormHook())))
        yield lambda: None
        for handle in handles:
            handle.remove()

    return enter


def seconds(enter: Setup, chunks: list[Any], micro_batches: list[Tensor], device: torch.device, clock: Clock) -> float:
    """Time one step; putting hooks on is not counted."""
    with enter() as end_step:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        forward_only(chunks, micro_batches, compute_loss=False)
        end_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def measure(
    setups: dict[str, Setup],
    chunks: list[Any],
    micro_batches: list[Tensor],
    device: torch.device,
    repeats: int,
    clock: Clock,
) -> dict[str, list[float]]:
    """Return the times of every round; each round begins with the plain pass, and ends with it too."""
    plain: Setup = lambda: nullcontext(lambda: None)  # noqa: E731
    times: dict[str, list[float]] = {name: [] for name in ("plain", *setups)}
    for number in range(repeats + 1):
        # Between two plain passes: a machine that grows busy meets all of a round alike.
        first = seconds(plain, chunks, micro_batches, device, clock)
        own = {name: seconds(setup, chunks, micro_batches, device, clock) for name, setup in setups.items()}
        last = seconds(plain, chunks, micro_batches, device, clock)
        if number:  # the first one warms up
            times["plain"].append((first + last) / 2)
            for name, value in own.items():
                times[name].append(value)
    return times


def table_of(title: str, times: dict[str, list[float]]) -> Table:
    table = Table("", "median ms", "x plain", "quartiles", title=title)
    for name, own in times.items():
        ratios = sorted(value / plain for value, plain in zip(own, times["plain"], strict=True))
        low, high = (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])
        table.add_row(
            name, f"{statistics.median(own) * 1e3:.1f}", f"{statistics.median(ratios):.3f}", f"{low:.3f} - {high:.3f}"
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, help="as memory allows, 32 on a GPU and 2 on a CPU at most")
    parser.add_argument("--tokens", type=int, help="of the one micro-batch of a step: 8192 on a GPU, 512 on a CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--processor-time", action="store_true", help="on a CPU: without waiting for other programs")
    parser.add_argument("--parts", action="store_true", help="each target of the recipe alone, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = local_device(options.device), getattr(torch, options.dtype)
    layers = options.layers or num_layers(device, dtype)
    length = options.tokens or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
    with parallel_world(ParallelConfig(), device, timedelta(minutes=10)):
        chunks = build(layers, dtype, device, length)
        tokens = torch.randint(LLAMA_3_8B["vocab_size"], (1, length)).to(device)  # type: ignore[call-overload]
        recipes = RECIPES if options.parts else dict(list(RECIPES.items())[:1])
        setups = {name: scoring(chunks, scores) for name, scores in recipes.items()}
        published = published_hooks()
        if published is not None:
            setups["published hooks, without layers"] = publishing(chunks, published)
        clock = time.process_time if options.processor_time else time.perf_counter
        times = measure(setups, chunks, [tokens], device, options.repeats, clock)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} threads"
    Console(width=110).print(table_of(f"{layers} layers, {length} tokens, {options.dtype}, {where}", times))


if __name__ == "__main__":
    main()
