"""The time of pruning a Hugging Face folder beside that of copying it, and its peak memory.

    python -m tests.benchmarks.pruning [--model FOLDER] [--gigabytes 4] [--repeats 3]

Copy (with fsync, as the pruned folder has) and prune take turns on the same disk; medians are shown. Each prune runs in
a fresh process, whose own anonymous memory (RssAnon, in steps of 10 ms) is told less what it had before: pages of the
input that the system keeps in its cache are not the process's. Without ``--model`` it is SmolLM2-135M; beside it a
random Llama of the given size in bfloat16 with files of 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launch import smollm2
from megascore.plans.kept_tensors import kept_tensors
from megascore.plans.units import all_units
from megascore.pruning.tensor_stream import Planned, write_tensors
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.folder import INDEX
from tests.smaller import random_plan

PRUNE = """
import sys, threading, time
import megascore
plan = megascore.load_plan(sys.argv[1], sys.argv[2])

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
megascore.prune(sys.argv[2], plan, sys.argv[3])
seconds = time.perf_counter() - start
done.set()
thread.join()
print(seconds, (peak - before) / 1024)
"""


def make_llama(folder: Path, gigabytes: float) -> Path:
    """Write a random Llama in bfloat16."""
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 4096) / (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336))))
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = read_config(folder)
    groups: list[dict[str, Planned]] = [{}]
    for tensor in kept_tensors(model, all_units(model)):
        if sum(planned.num_bytes for planned in groups[-1].values()) > 1e9:
            groups.append({})
        groups[-1][tensor.name] = Planned("BF16", tensor.shape)
    noise = torch.randn(1 << 20).bfloat16()
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"

        def make(key: str, group: dict[str, Planned] = group) -> list[torch.Tensor]:
            shape = group[key].shape
            size = torch.Size(shape).numel()
            return [noise.repeat(-(-size // len(noise)))[:size]]

        write_tensors(folder / name, group, make)
        weight_map.update(dict.fromkeys(group, name))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def copy(source: Path, target: Path) -> float:
    """Copy a folder as ``cp -r`` does, and wait for the disk; return seconds."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def measure(source: Path, root: Path, repeats: int) -> tuple[float, float, float]:
    """Return median seconds of copying and pruning, and the largest peak in MB."""
    multiple = 8
    plan = random_plan(source, ffn="75%", hidden_size="90%", layers="90%", multiple_of=multiple)
    plan.save(root / "plan.yaml", overwrite=True)
    copies, prunes, peaks = [], [], []
    for _ in range(repeats):
        copies.append(copy(source, root / "copy"))
        shutil.rmtree(root / "copy")
        arguments = [sys.executable, "-c", PRUNE, root / "plan.yaml", source, root / "pruned"]
        told = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
        prunes.append(float(told[0]))
        peaks.append(float(told[1]))
        shutil.rmtree(root / "pruned")
    return statistics.median(copies), statistics.median(prunes), max(peaks)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    arguments = parser.parse_args()
    table = Table("model", "GB", "copy s", "prune s", "ratio", "peak MB", "largest tensor MB")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        sources = [arguments.model or smollm2.convert_once(smollm2.default_folder())]
        if arguments.gigabytes:
            sources.append(make_llama(root / "llama", arguments.gigabytes))
        for source in sources:
            copied, pruned, peak = measure(source, root, arguments.repeats)
            size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
            model = read_config(source)
            largest = max(torch.Size(tensor.shape).numel() for tensor in kept_tensors(model, all_units(model)))
            bytes_each = 2 if source.name == "llama" else 4
            ratio = f"{pruned / copied:.2f}"
            row = (f"{size:.2f}", f"{copied:.2f}", f"{pruned:.2f}", ratio, f"{peak:.0f}")
            table.add_row(source.name, *row, f"{largest * bytes_each / 1e6:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
