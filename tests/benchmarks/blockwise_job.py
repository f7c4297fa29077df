"""The cost of ``run.blockwise`` in a Megatron job: peak resident memory and time, beside the same job in a full pass.

    python -m tests.benchmarks.blockwise_job [--samples 16] [--length 256] [--pipeline 1] [--megatron]

SmolLM2-135M in float32, the shipped text, recipe minitron, on the CPU; from its Hugging Face folder, or from a Megatron
``torch_dist`` checkpoint that is made of it first. Each way runs in fresh processes, one for each
pipeline stage; the memory is that of the largest. ``base`` is a dry run of a model of one layer, near enough to what
Python, Megatron and torch.distributed take by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch import smollm2
from megascore.scores.score_file import load_scores

RANK = """
import json, resource, sys, time
from megascore.cli import main
import torch
torch.set_num_threads(1)
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("measured " + json.dumps({"peak": peak, "cpu": time.process_time()}))
sys.exit(code)
"""


SAVE = """
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
import torch
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import parallel_world
from megascore.config import ModelConfig, ParallelConfig
from tests.mcore.torch_dist import save_torch_dist, training_args
model, folder = map(Path, sys.argv[1:])
cpu, whole = torch.device("cpu"), ParallelConfig()
with parallel_world(whole, cpu, timedelta(minutes=1)):
    chunks = load_model(ModelConfig(hf=str(model), dtype="float32"), whole, cpu, 16)
    save_torch_dist(chunks, folder, args=training_args(model))
"""
"""In a process of its own, for its memory would count as that of those which are started next."""


def run_ranks(world_size: int, arguments: list[str]) -> dict[str, float]:
    """Run ``megascore`` on some ranks; return the largest peak memory in bytes, and the CPU seconds of all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    found = [json.loads(output.rpartition("measured ")[2]) for output in outputs]
    return {"peak": max(one["peak"] for one in found), "cpu": sum(one["cpu"] for one in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--megatron", action="store_true", help="read a torch_dist checkpoint")
    options = parser.parse_args()
    model = smollm2.default_folder()
    smollm2.convert_once(model)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "job.yaml"
        text = Path(smollm2.__file__).parent / "text" / "northanger_abbey.txt"
        sections: dict[str, dict[str, Any]] = {
            "model": {"hf": str(model), "dtype": "float32"},
            "data": {"text": str(text), "sequence_length": options.length, "num_samples": options.samples},
            "parallel": {"pipeline": options.pipeline},
            "run": {"device": "cpu", "micro_batch_size": 2},
        }
        if options.megatron:
            checkpoint = Path(folder) / "megatron"
            subprocess.run([sys.executable, "-c", SAVE, str(model), str(checkpoint)], check=True)
            sections["model"]["load"] = str(checkpoint)
        config.write_text(json.dumps(sections))
        ways = {
            "full pass": [],
            "full pass, no loss": ["run.loss=false"],
            "run.blockwise": ["run.blockwise=true"],
            "run.blockwise, no loss": ["run.blockwise=true", "run.loss=false"],
            "run.blockwise, no loss, spool folder": [
                "run.blockwise=true", "run.loss=false", f"run.spool_dir={folder}/spool",
            ],
        }  # fmt: skip
        for number, (way, overrides) in enumerate(ways.items()):
            output = Path(folder) / f"{number}.safetensors"
            measured = run_ranks(options.pipeline, ["score", str(config), f"run.output={output}", *overrides])
            checksum = float(sum(value.sum() for value in load_scores(output).values()))
            print(f"{way}: {measured['peak'] / 1e6:.0f} MB, {measured['cpu']:.1f} CPU s, checksum {checksum:.6f}")


if __name__ == "__main__":
    main()
