"""The cost of scoring one block at a time: peak resident memory and time, beside a full pass over the same batches.

    python -m tests.benchmarks.blockwise [--model FOLDER] [--samples 16] [--length 256] [--batch 2] [--threads 2]

Each way runs in a fresh process on SmolLM2-135M in float32 and the shipped text with the minitron scores, and reads the
weights from the same safetensors file: the full pass as transformers does, the others block by block. The memory is
what the system counted at its highest (ru_maxrss); what Python and its libraries take before the model is built is told
beside. Times go from there to the scores: CPU time counts only this process, whatever else the machine does. Repeats
take turns, and the medians are shown; the last way runs the first block as often as there are blocks, and so is
measured once, on request (``--fresh``).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from launch import smollm2
from megascore.config import DataConfig
from megascore.data import load_samples

WAYS = {
    "full pass": {},
    "block by block, cache_block_outputs=True": {"cache_block_outputs": True},
    "the same, inputs in a spool folder": {"cache_block_outputs": True, "spool": True},
    "block by block, cache_block_outputs=False": {"cache_block_outputs": False},
}


def peak_bytes() -> int:
    """Largest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def score(way: str, folder: Path, batches: list[torch.Tensor]) -> Any:
    import megascore
    from megascore.capture import SpoolStore

    options: dict[str, Any] = dict(WAYS[way])
    if options:
        with tempfile.TemporaryDirectory() as spool:
            store = SpoolStore(spool) if options.pop("spool", False) else None
            scores = megascore.score_blockwise(folder, None, batches, **options, store=store)
            if store is not None:
                store.close()
            return scores
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
        for batch in batches:
            model(batch)
            run.step()
    return run.finish()


def run_one(way: str, options: argparse.Namespace) -> None:
    """Run one way, and print what it took and a number that tells whether it gave the same."""
    import transformers

    import megascore

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokens = load_file(options.tokens)["tokens"]
    # Libraries load parts of themselves at the first use, in every way alike.
    assert transformers.AutoModelForCausalLM
    assert megascore.score_blockwise
    from transformers.models.llama import modeling_llama

    assert modeling_llama
    base = peak_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = score(way, options.model, list(tokens.split(options.batch)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    checksum = float(sum(value.sum() for value in scores.values()))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak_bytes(), "base": base, "checksum": checksum}))


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one way in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.blockwise", "--way", way, "--model", str(options.model)]
    for name in ("tokens", "batch", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory; SmolLM2-135M if not given")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="also cache_block_outputs=False")
    parser.add_argument("--tokens", type=Path, help="for --way: a safetensors file with them")
    parser.add_argument("--way", choices=list(WAYS), help="run only this, in this process")
    options = parser.parse_args()
    if options.model is None:
        options.model = smollm2.default_folder()
        smollm2.convert_once(options.model)
    if options.way:
        run_one(options.way, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.tokens = Path(folder) / "tokens.safetensors"
        text = Path(smollm2.__file__).parent / "text" / "northanger_abbey.txt"
        data = DataConfig(text=str(text), sequence_length=options.length, num_samples=options.samples)
        save_file({"tokens": load_samples(data, options.model).tokens}, options.tokens)
        show(measure_all(options), options)


def measure_all(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    *often, fresh = WAYS
    for _ in range(options.repeats):
        for way in often:
            found[way].append(measure(way, options))
    if options.fresh:
        found[fresh].append(measure(fresh, options))
    return found


def show(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    def median(way: str, name: str) -> float:
        return statistics.median(run[name] for run in found[way])

    first = next(iter(WAYS))
    size = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    title = (
        f"{options.samples} samples of {options.length} tokens, batches of {options.batch}, {options.threads} threads; "
        f"weights {size / 1e6:.0f} MB"
    )
    table = Table(
        "",
        "peak MB",
        "x full",
        "above libraries MB",
        "x full",
        "seconds",
        "x full",
        "CPU s",
        "x full",
        "checksum",
        title=title,
    )
    for way in [way for way in WAYS if found[way]]:
        peak, above = median(way, "peak"), median(way, "peak") - median(way, "base")
        seconds = median(way, "seconds")
        table.add_row(
            way,
            f"{peak / 1e6:.0f}",
            f"{peak / median(first, 'peak'):.2f}",
            f"{above / 1e6:.0f}",
            f"{above / (median(first, 'peak') - median(first, 'base')):.2f}",
            f"{seconds:.1f}",
            f"{seconds / median(first, 'seconds'):.2f}",
            f"{median(way, 'cpu'):.1f}",
            f"{median(way, 'cpu') / median(first, 'cpu'):.2f}",
            f"{median(way, 'checksum'):.6f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
